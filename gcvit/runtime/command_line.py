"""Build the parsers of commands alike."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from gcvit.errors import UserError


def command_parser(module: str, usage: str, description: str | None) -> ArgumentParser:
    """Build the parser of `python -m MODULE USAGE`; its description keeps its line breaks, options have no short forms.

    Args:
        module: Dotted name of the command's module.
        usage: Arguments of the command, such as "SOURCE OUT [flags]".
        description: Text of --help above the options.
    """
    return ArgumentParser(
        prog=f"python -m {module}",
        usage=f"%(prog)s {usage}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def check_at_least_one(**values: int | None) -> None:
    """Check that options, by their names with underscores, are 1 or more where they are given.

    Raises:
        UserError: An option is 0 or negative.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is too small", got=value, expected="at least 1")
