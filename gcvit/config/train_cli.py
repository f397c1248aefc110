"""Parse the command line of `train.py`."""

from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter

from gcvit.errors import UserError

_OF_A_START = ("resume", "init_from", "reset_head")
_OF_A_PLAN = ("gpus", "gpu", "mfu")
_NOT_OF_ONE_BATCH = ("batch_size", "model_ema", "tag")
_ABSENT = {"resume": "auto"}  # what a flag that is not given reads as, beside None and False


def parse_arguments(description: str | None) -> Namespace:
    """Parse the flags, and the `overrides` of options; `check` refuses those that do not go together.

    Raises:
        SystemExit: The command line has an unknown flag; the exit code is 2.
    """
    parser = ArgumentParser(
        usage="%(prog)s --config FILE [flags] [dotted.key=value ...]",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    what.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="any option of the config")
    what.add_argument("--data_dir", "--data-dir", metavar="DIR", help="folder with train/ and val/ (data.dir)")
    what.add_argument(
        "--batch-size",
        "--batch_size",
        type=_batch_size,
        metavar="N|auto",
        help="samples per pass (trainer.micro_batch_size)",
    )
    what.add_argument("--tag", help="name of the run (tag)")
    what.add_argument("--model-ema", "--model_ema", action="store_true", help="average the weights (ema)")

    start = parser.add_argument_group("from where")
    start.add_argument("--resume", default="auto", metavar="auto|none|PATH", help="checkpoint to go on from")
    start.add_argument("--init-from", "--init_from", metavar="RUN|FILE|NAME", help="start from these weights")
    start.add_argument("--reset-head", "--reset_head", action="store_true", help="... of which the head is left out")

    instead = parser.add_argument_group("instead of training")
    chosen = instead.add_mutually_exclusive_group()
    chosen.add_argument("--plan", action="store_true", help="say what the training will take; touches no GPU")
    chosen.add_argument("--overfit-one-batch", action="store_true", help="a minute's check: is one batch learned?")
    chosen.add_argument("--replay", metavar="STEP", type=int, help="do this step of the log again, to explain it")
    instead.add_argument("--gpus", type=int, metavar="N", help="--plan for so many (those of this machine)")
    instead.add_argument("--gpu", metavar="NAME", help="--plan for this kind, such as h100-80 (this machine's)")
    instead.add_argument("--mfu", type=float, metavar="SHARE", help="--plan with this share of its peak (0.3)")
    parser.add_argument("--local_rank", "--local-rank", help=SUPPRESS)  # passed by the deepspeed launcher
    return parser.parse_intermixed_args()


def check(arguments: Namespace) -> None:
    """Check that no flag is without effect beside others, and that no folder is empty.

    Raises:
        UserError: A flag has no effect, or the folder's name is empty.
    """
    if arguments.data_dir == "":
        raise UserError("--data_dir is empty", hint="give a folder or a URL")
    _refuse(arguments, _OF_A_PLAN, arguments.plan, "belongs to a plan", "add --plan")
    is_start = not (arguments.plan or arguments.overfit_one_batch)
    _refuse(arguments, _OF_A_START, is_start, "belongs to a training", "leave it out")
    is_whole = not arguments.overfit_one_batch
    _refuse(arguments, _NOT_OF_ONE_BATCH, is_whole, "has no effect on --overfit-one-batch", "leave it out")


def _refuse(arguments: Namespace, names: tuple[str, ...], is_fitting: bool, what: str, hint: str) -> None:
    values = {name: getattr(arguments, name) for name in names}
    # By identity: 0 is a value, though it equals False.
    given = [name for name, x in values.items() if x is not None and x is not False and x != _ABSENT.get(name)]
    if given and not is_fitting:
        raise UserError(f"--{given[0].replace('_', '-')} {what}", got=getattr(arguments, given[0]), hint=hint)


def _batch_size(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise ArgumentTypeError(f"got {text}; expected: a whole number, or auto") from None
