"""TensorBoard events and, if enabled, Weights & Biases: the same numbers, pictures and texts in both."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from gcvit.config.load import dump_config
from gcvit.config.schema import Config
from gcvit.data.download import is_remote, redact
from gcvit.errors import UserError

ID_FILE = "wandb_id"


class Events:
    """Write a run's events, on one rank. Steps count finished ones.

    A resumed run repeats some steps. TensorBoard then hides the events of the first attempt. W&B cannot delete them,
    and has these steps twice.
    """

    def __init__(self, config: Config, first_step: int):
        """Open the writers.

        Raises:
            UserError: W&B is enabled and is not installed, or does not start.
        """
        self._config = hide_secrets(config)
        self._writer = SummaryWriter(str(config.run_dir), purge_step=first_step + 1)
        self._writer.add_text("config", f"```yaml\n{dump_config(self._config)}\n```", first_step)
        self._online = _start_wandb(self._config) if config.wandb else None

    def add_scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        if self._online is not None:
            self._online.log({f"{kind}/{name}": value for name, value in values.items()} | {"step": step})

    def add_histogram(self, name: str, values: npt.NDArray[np.float64], step: int) -> None:
        self._writer.add_histogram(name, values, step)
        if self._online is not None:
            self._online.log({name: _wandb().Histogram(values), "step": step})

    def add_image(self, name: str, image: npt.NDArray[np.uint8], caption: str, step: int) -> None:
        """Add a picture, uint8 [H, W, 3]."""
        self._writer.add_image(name, image, step, dataformats="HWC")
        self._writer.add_text(f"{name}/targets", caption, step)
        if self._online is not None:
            self._online.log({name: _wandb().Image(image, caption=caption), "step": step})

    def add_result(self, values: Mapping[str, float], step: int) -> None:
        """Add the hyper-parameters with the final result, for TensorBoard's comparison of runs."""
        # What `SummaryWriter.add_hparams` writes, without the folder of its own that it makes for it.
        options = flatten(self._config.model_dump(mode="json"))
        results = {f"result/{name}": value for name, value in values.items()}
        for summary in hparams(options, results):
            self._writer._get_file_writer().add_summary(summary)
        for name, value in results.items():
            self._writer.add_scalar(name, value, step)
        if self._online is not None:
            self._online.summary.update(results)

    def mark_preempted(self) -> None:
        """Mark the run as preempted, to be resumed."""
        if self._online is not None:
            self._online.mark_preempting()

    def close(self, *, finished: bool) -> None:
        """Close the writers; `finished` is False if the run ends by an error or a preemption."""
        self._writer.close()
        if self._online is not None:
            self._online.finish(exit_code=0 if finished else 1)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float | str | bool]:
    """Flatten a tree to plain values by dotted key; anything but numbers and booleans becomes text."""
    flat: dict[str, float | str | bool] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def hide_secrets(config: Config) -> Config:
    """Return the config with the URL of its data without password and signature."""
    data = config.data
    if data.dir is None or not is_remote(data.dir):
        return config
    return config.model_copy(update={"data": data.model_copy(update={"dir": redact(data.dir)})})


def _wandb() -> Any:
    try:
        import wandb  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):  # a folder "wandb", which it leaves in the place of a start, can be imported too
        raise UserError("wandb=true, and it is not installed", hint="pip install wandb, or set wandb=false")
    return wandb


def check_wandb(config: Config) -> None:
    """Check that W&B is installed if it is enabled.

    Raises:
        UserError: It is not.
    """
    if config.wandb:
        _wandb()


def _start_wandb(config: Config) -> Any:
    """Start the run online, by an id that is kept in the run's folder; project and account are W&B's own settings."""
    wandb, id_file = _wandb(), config.run_dir / ID_FILE
    if not id_file.exists():
        id_file.write_text(f"{uuid4().hex}\n")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gcvit"),  # given, it would go before W&B's own variable
            name=config.tag,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
            save_code=False,
            # No command line, environment or source: a token may stand there.
            settings=wandb.Settings(x_disable_meta=True, disable_git=True, disable_code=True),
        )
    except Exception as error:  # of the network, of an account: its own kinds are many
        raise UserError(
            "W&B does not start", got=error, hint="wandb login, WANDB_MODE=offline, or wandb=false"
        ) from None
    run.define_metric("*", step_metric="step")  # not its own counter, which counts calls
    return run


def describe_targets(targets: Sequence[Sequence[Any]]) -> str:
    """Format [[class, share], ...] as text."""
    return " + ".join(f"{share:.0%} {name}" for name, share in targets)
