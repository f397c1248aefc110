"""All tools, with an example each."""

import argparse

import gcvit

# By what one wants to do: what a tool is for, and an example.
TOOLS: dict[str, dict[str, str]] = {
    "prepare data": {
        "Pack images into shards": "python -m data_prep.shard /data/imagenet /data/imagenet-wds",
        "Make a manifest for shards of others": "python -m data_prep.index /data/others-wds",
        "Check shards down to the last image": "python -m data_prep.verify /data/imagenet-wds",
        "Write the images of the demo": "python -m data_prep.digits data/digits/raw",
    },
    "train": {
        "Plan: memory, speed, GPU hours": "python train.py --config configs/gc_vit_tiny.yaml --plan --gpu h100-80",
        "Check that it can learn": "python train.py --config configs/gc_vit_tiny.yaml --data_dir D --overfit-one-batch",
        "Train on one GPU": "python train.py --config configs/gc_vit_tiny.yaml --data_dir /data/imagenet-wds",
        "Train on 8": "torchrun --nproc-per-node 8 train.py --config configs/gc_vit_tiny.yaml --data_dir DIR",
        "Train on a cluster": "sbatch --nodes 4 launch/train.sbatch configs/gc_vit_tiny.yaml --data_dir DIR",
    },
    "evaluate": {
        "Count what is right, exactly": "python evaluate.py runs/gc_vit_tiny --data_dir /data/imagenet-wds",
        "List what each image is taken for": "python evaluate.py runs/TAG --data_dir DIR --predictions all.parquet",
        "Measure latency and throughput": "python evaluate.py runs/TAG --benchmark",
        "Write a page on a run, or on several": "python -m gcvit.report runs/gc_vit_tiny",
    },
    "use": {
        "Tell what is on an image": "python -m gcvit.predict cat.jpg --checkpoint runs/gc_vit_tiny",
        "Hand weights and a model card to others": "python -m gcvit.export runs/gc_vit_tiny",
        "The same in ONNX": "python -m gcvit.export.onnx_export runs/gc_vit_tiny gc_vit_tiny.onnx",
        "Change the layout of weights": "python -m gcvit.model.weights convert a.pth.tar b.safetensors --to timm",
        "Show what a model consists of": "python -m gcvit.model.summary gc_vit_tiny",
    },
}


def list_tools() -> str:
    """The tools for a terminal."""
    lines = [f"gcvit {gcvit.__version__}, a large-scale trainer for GC ViT. Its tools, with an example each:"]
    for purpose, tools in TOOLS.items():
        lines += ["", purpose, *(f"  # {about}\n  {example}" for about, example in tools.items())]
    return "\n".join([*lines, "", "--help behind a tool lists its flags, and README.md the guides."])


def main() -> None:
    parser = argparse.ArgumentParser("python -m gcvit", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="version", version=gcvit.__version__)
    parser.parse_args()
    print(list_tools())


if __name__ == "__main__":
    main()
