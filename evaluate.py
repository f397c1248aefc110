"""Evaluate a GC ViT, each sample counted once on any number of processes.

    python evaluate.py runs/demo-fsdp --data_dir data/digits
    torchrun --nproc-per-node 8 evaluate.py runs/gc_vit_large_fsdp --data_dir /data/imagenet-wds
    python evaluate.py runs/gc_vit_tiny --data_dir v2=/data/imagenet-v2 --data_dir a=/data/imagenet-a --weights both
    python evaluate.py --model gc_vit_tiny --checkpoint gcvit_1k_tiny.pth.tar --data_dir DIR --tta flip
    python evaluate.py runs/gc_vit_tiny --benchmark

Standard output has one line of JSON for each set and kind of weights: top1, top5 (percent), loss, ece, num_samples,
correct_top1, correct_top5, num_skipped (corrupt). The rest is in RUN/evaluations: see docs/evaluation.md.
"""

from argparse import Namespace

from gcvit.config import evaluate_cli
from gcvit.runtime.entrypoint import run_main


def parse_arguments() -> Namespace:
    return evaluate_cli.parse_arguments(__doc__)


def main() -> None:
    arguments = parse_arguments()
    evaluate_cli.check(arguments)

    from gcvit.evaluation import suite  # loads torch: --help is quicker without
    from gcvit.evaluation.latency import benchmark
    from gcvit.runtime.distributed import join_world

    options = suite.read_options(arguments)
    sets = suite.open_sets(arguments)
    candidates = suite.find_candidates(arguments, options)
    if arguments.benchmark:
        with join_world() as world:
            return benchmark(candidates[0], options, arguments.batch_size, world)
    targets = suite.match(sets, candidates[0])
    with join_world(deterministic=True) as world:
        suite.evaluate_all(
            sets, targets, candidates, options, world, out=arguments.out, predictions_file=arguments.predictions
        )


if __name__ == "__main__":
    run_main(main)
