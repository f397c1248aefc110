"""Parse the command line of `evaluate.py`."""

from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter

from gcvit.errors import UserError


def parse_arguments(description: str | None) -> Namespace:
    """Parse the flags; `check` refuses those that do not go together.

    Raises:
        SystemExit: The command line has an unknown flag; the exit code is 2.
    """
    parser = ArgumentParser(
        usage="%(prog)s RUN... --data_dir DIR [flags]",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is evaluated")
    what.add_argument("runs", nargs="*", metavar="RUN", help="runs/TAG (its best), a checkpoint in it, or an export")
    what.add_argument("--weights", choices=["ema", "model", "both"], help="of a run (its EMA where there is one)")
    what.add_argument("--average", action="store_true", help="average the weights of several RUNs or FILEs")
    what.add_argument("--model", metavar="NAME", help="a variant, for a --checkpoint without a run")
    what.add_argument("--checkpoint", metavar="FILE", nargs="+", help="weights in any layout, with --model")

    data = parser.add_argument_group("on which images")
    data.add_argument(
        "--data_dir",
        "--data-dir",
        metavar="[SET=]DIR",
        action="append",
        help="folder or URL with the split; repeat it for several. SET: imagenet, real, v2, a, r, sketch",
    )
    data.add_argument("--split", help="folder below DIR (val)")
    data.add_argument("--cache_dir", "--cache-dir", metavar="DIR", help="where a URL's shards are kept")
    data.add_argument("--cache_bytes", "--cache-bytes", metavar="N", type=int, help="most bytes kept there")
    data.add_argument("--skip-corrupt", action="store_true", help="leave corrupt samples out, and count them")

    how = parser.add_argument_group("how they are transformed (default: as the run or the variant's card says)")
    how.add_argument("--img-size", "--img_size", metavar="N[,N...]", type=_numbers, help="sizes to average over")
    how.add_argument("--crop-pct", metavar="SHARE", type=float, help="of the resized image that a crop keeps")
    how.add_argument("--resize", choices=["crop", "squash"], help="the short side, then crop; or both sides")
    how.add_argument("--tta", choices=["flip", "ten-crop"], help="average over mirror images, or over ten crops")
    how.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="(fp32)")
    how.add_argument(
        "--batch-size", "--batch_size", metavar="N[,N...]", type=_numbers, help="per device (64; timed: 1 to 64)"
    )

    out = parser.add_argument_group("what is kept")
    out.add_argument("--out", metavar="DIR", help="for NAME.json of each evaluation and results.csv (RUN/evaluations)")
    out.add_argument("--predictions", metavar="FILE", help=".csv or .parquet: each sample's top 5 and confidence")

    instead = parser.add_argument_group("instead")
    instead.add_argument("--benchmark", action="store_true", help="time the model at each --batch-size; needs no data")
    parser.add_argument("--local_rank", "--local-rank", help=SUPPRESS)  # passed by the deepspeed launcher
    return parser.parse_intermixed_args()


def check(arguments: Namespace) -> None:
    """Check that the flags go together and that their numbers are possible.

    Raises:
        UserError: Flags contradict each other, or a number is impossible.
    """
    has_file = arguments.model is not None or arguments.checkpoint is not None
    if bool(arguments.runs) == has_file or (arguments.model is None) != (arguments.checkpoint is None):
        raise UserError("what to evaluate?", expected="RUN, or --model NAME --checkpoint FILE")
    num = len(arguments.runs or arguments.checkpoint)
    if (num > 1) != arguments.average:
        raise UserError(
            "--average is of several" if arguments.average else "several weights at once",
            got=f"{num} RUNs or FILEs",
            hint="name more, or leave --average out" if arguments.average else "add --average, or evaluate each",
        )
    if arguments.weights and has_file:
        raise UserError("a file holds one kind of weights", got=f"--weights {arguments.weights}", hint="leave it out")
    if any(not given or given.endswith("=") for given in arguments.data_dir or ()):
        raise UserError("--data_dir is empty", hint="give a folder or a URL")
    if arguments.benchmark == bool(arguments.data_dir):
        hint = "leave out --data_dir" if arguments.benchmark else "give --data_dir DIR, a folder with the split"
        raise UserError("--benchmark uses no images" if arguments.benchmark else "no data", hint=hint)
    sizes = arguments.batch_size or (64,)
    if min(sizes) < 1 or (len(sizes) > 1 and not arguments.benchmark):
        expected = "1 or more" + ("" if arguments.benchmark else ", and one number")
        raise UserError("--batch-size", got=",".join(map(str, sizes)), expected=expected)
    if arguments.img_size and len(set(arguments.img_size)) < len(arguments.img_size):
        raise UserError("--img-size", got=",".join(map(str, arguments.img_size)), expected="different sizes")
    if arguments.crop_pct is not None and not 0 < arguments.crop_pct <= 1:
        raise UserError("--crop-pct", got=arguments.crop_pct, expected="above 0, at most 1")
    unused = {"--tta": arguments.tta, "--predictions": arguments.predictions, "--out": arguments.out}
    unused |= {"--crop-pct": arguments.crop_pct, "--resize": arguments.resize, "--cache_dir": arguments.cache_dir}
    unused |= {"--cache_bytes": arguments.cache_bytes, "--split": arguments.split}
    unused |= {"--skip-corrupt": arguments.skip_corrupt, "--weights both": arguments.weights == "both"}
    if arguments.benchmark and (given := [flag for flag, value in unused.items() if value]):
        raise UserError("has no effect with --benchmark", got=", ".join(given), hint="leave it out")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"got {text}; expected: a whole number, or several as 224,256") from None
