"""Train a GC ViT.

    python train.py --config configs/digits_demo.yaml --data_dir data/digits
    torchrun --nproc-per-node 8 train.py --config configs/gc_vit_large_fsdp.yaml --data_dir /data/imagenet-wds
    deepspeed --num_gpus 8 train.py --config configs/gc_vit_large_zero.yaml --data_dir /data/imagenet-wds
    python train.py --config configs/gc_vit_large_fsdp.yaml --plan --gpus 32 --gpu h100-80

Any option of the config can be set behind the flags as dotted.key=value.
"""

from argparse import Namespace

from gcvit.config import train_cli
from gcvit.config.load import load_config
from gcvit.config.schema import EmaConfig
from gcvit.data.worker_process import loader_context
from gcvit.runtime import signals
from gcvit.runtime.entrypoint import run_main


def parse_arguments() -> Namespace:
    return train_cli.parse_arguments(__doc__)


def main() -> None:
    arguments = parse_arguments()
    train_cli.check(arguments)
    options = {"data.dir": arguments.data_dir, "trainer.micro_batch_size": arguments.batch_size, "tag": arguments.tag}
    config, messages = load_config(arguments.config, arguments.overrides, options)
    if arguments.model_ema:
        config = config.model_copy(update={"ema": config.ema or EmaConfig()})
    if arguments.plan:
        from gcvit.planning.format_plan import print_plan

        return print_plan(config, messages, num_gpus=arguments.gpus, gpu=arguments.gpu, mfu=arguments.mfu)
    if arguments.replay is None and not arguments.overfit_one_batch:
        signals.install_handlers()
    if config.data.num_workers:
        loader_context()  # takes seconds to be ready, as do the next imports: side by side
    from gcvit.data.source import open_sources
    from gcvit.monitoring.writers import check_wandb
    from gcvit.runtime.distributed import join_world  # loads torch: a misspelt key is told before that
    from gcvit.training.overfit import overfit_one_batch
    from gcvit.training.replay import replay
    from gcvit.training.setup import build_trainer

    check_wandb(config)
    sources = open_sources(config.data, config.model.num_classes)
    start_from = {"resume": arguments.resume, "init_from": arguments.init_from, "reset_head": arguments.reset_head}
    with join_world(config.trainer.deterministic, config.trainer.hang_timeout) as world:
        if arguments.overfit_one_batch:
            return overfit_one_batch(config, world, sources)
        if arguments.replay is not None:
            return replay(config, world, sources, arguments.replay, **start_from)
        with build_trainer(config, world, sources, **start_from, messages=messages) as trainer:
            trainer.train()


if __name__ == "__main__":
    run_main(main)
