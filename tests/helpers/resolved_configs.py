"""Write what every file in configs/ resolves to, so that a changed default cannot change a recipe silently.

    python -m tests.helpers.resolved_configs

`tests/unit/config/test_shipped_configs.py` compares the files with what this wrote. Write it again only where a recipe
is meant to change, and name the change in the commit and in CHANGELOG.md.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from gcvit.config.load import load_config

ROOT = Path(__file__).parents[2]
RESOLVED = ROOT / "tests/unit/config/resolved_configs.yaml"


def resolve_configs() -> dict[str, Any]:
    """Resolve every file in configs/.

    Returns:
        By the file's name without its suffix: each section and option as plain values, defaults included.
    """
    files = sorted((ROOT / "configs").glob("*.yaml"))
    return {path.stem: load_config(path)[0].model_dump(mode="json") for path in files}


def main() -> None:
    argparse.ArgumentParser(prog="python -m tests.helpers.resolved_configs", description=__doc__).parse_args()
    text = yaml.safe_dump(resolve_configs(), sort_keys=False, default_flow_style=None, width=118)
    RESOLVED.write_text(text)
    print(f"{RESOLVED.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
