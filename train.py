"""Train a GC ViT.

    python train.py --config configs/digits_demo.yaml --data_dir data/digits
    torchrun --nproc-per-node 8 train.py --config configs/gc_vit_large_fsdp.yaml --data_dir /data/imagenet-wds
    deepspeed --num_gpus 8 train.py --config configs/gc_vit_large_zero.yaml --data_dir /data/imagenet-wds

Any knob of the config can be set behind the flags as dotted.key=value.
"""

from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter

from gcvit import notice
from gcvit.config import EmaConfig
from gcvit.config_file import load_config
from gcvit.data.forkserver import loader_context
from gcvit.errors import run_main


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("--data_dir", "--data-dir", metavar="DIR", help="folder with train/ and val/ (data.dir)")
    parser.add_argument("--batch-size", "--batch_size", type=int, help="samples per pass (trainer.micro_batch_size)")
    parser.add_argument("--tag", help="name of the run (tag)")
    parser.add_argument("--model-ema", "--model_ema", action="store_true", help="average the weights (ema)")
    parser.add_argument("--resume", default="auto", metavar="auto|none|PATH", help="checkpoint to go on from")
    parser.add_argument("--init-from", "--init_from", metavar="FILE|NAME", help="start from these weights")
    parser.add_argument("--reset-head", "--reset_head", action="store_true", help="... of which the head is left out")
    parser.add_argument("--replay", metavar="STEP", type=int, help="do this step of the log again, to explain it")
    parser.add_argument("--local_rank", "--local-rank", help=SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="any knob of the config")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.replay is None:
        notice.heed()
    knobs = {"data.dir": arguments.data_dir, "trainer.micro_batch_size": arguments.batch_size, "tag": arguments.tag}
    config, notices = load_config(arguments.config, arguments.overrides, knobs)
    if arguments.model_ema and config.ema is None:
        config = config.model_copy(update={"ema": EmaConfig()})
    if config.data.num_workers:
        loader_context()  # takes seconds to be ready, as do the next imports: side by side
    from gcvit.parallel.world import join_world  # loads torch: a misspelt key is told before that
    from gcvit.replay import replay
    from gcvit.run import open_sources, start
    from gcvit.trainer import train

    sources, start_from = open_sources(config), (arguments.resume, arguments.init_from, arguments.reset_head)
    with join_world(config.trainer.deterministic, config.trainer.hang_timeout) as world:
        if arguments.replay is not None:
            return replay(config, world, sources, arguments.replay, *start_from)
        with start(config, world, sources, *start_from, notices) as run:
            train(run)


if __name__ == "__main__":
    run_main(main)
