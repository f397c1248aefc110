"""Evaluate a GC ViT, each sample counted once on any number of processes.

    python evaluate.py runs/demo-fsdp --data_dir data/digits
    torchrun --nproc-per-node 8 evaluate.py runs/gc_vit_large_fsdp --data_dir /data/imagenet-wds
    python evaluate.py --model gc_vit_tiny --checkpoint gcvit_1k_tiny.pth.tar --data_dir DIR --batch-size 128

The last line of standard output is JSON: top1, top5 (percent), loss, num_samples, correct_top1, num_skipped (damaged).
"""

import argparse

from gcvit.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("run", nargs="?", metavar="RUN_OR_CHECKPOINT", help="runs/TAG (its best) or a checkpoint in it")
    parser.add_argument("--model", metavar="NAME", help="a variant, for a --checkpoint without a run")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights in any layout, with --model")
    parser.add_argument("--img-size", "--img_size", metavar="N", type=int, help="of --model; default: its own")
    parser.add_argument("--weights", choices=["ema", "model"], help="of a run; default: ema where there is one")
    parser.add_argument("--data_dir", "--data-dir", metavar="DIR", required=True, help="folder or URL with the split")
    parser.add_argument("--cache_dir", "--cache-dir", metavar="DIR", help="where a URL's shards are kept")
    parser.add_argument("--cache_bytes", "--cache-bytes", metavar="N", type=int, help="most bytes kept there")
    parser.add_argument("--split", default="val", help="folder below DIR (val)")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=64, metavar="N", help="per device (64)")
    parser.add_argument("--skip-damaged", action="store_true", help="leave damaged samples out, and count them")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    given = tuple(value is not None for value in (arguments.run, arguments.model, arguments.checkpoint))
    if given not in ((True, False, False), (False, True, True)) or (arguments.run and arguments.img_size):
        raise UserError("what to evaluate?", allowed="RUN_OR_CHECKPOINT, or --model NAME --checkpoint FILE")

    from gcvit.data.source import open_source
    from gcvit.evaluator import evaluate, load_file, load_run  # loads torch: --help is quicker without
    from gcvit.parallel.world import join_world

    source = open_source(arguments.data_dir, arguments.split, arguments.cache_dir, arguments.cache_bytes)
    classes = len(source.classes)
    if arguments.run:
        model, data = load_run(arguments.run, arguments.weights, num_classes=classes)
    else:
        model, data = load_file(arguments.model, arguments.checkpoint, num_classes=classes, img_size=arguments.img_size)
    with join_world() as world:
        model.eval().to(world.device)
        options = {"batch_size": arguments.batch_size, "skip_damaged": arguments.skip_damaged}
        result = evaluate(model, source, data, world, img_size=model.input_size[-1], **options)
        if world.is_first:
            print(result.as_json(), flush=True)


if __name__ == "__main__":
    run_main(main)
