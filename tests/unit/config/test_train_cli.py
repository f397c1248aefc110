"""The flags of train.py and evaluate.py: every spelling is read alike, and sets its option of the config."""

import sys
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import evaluate
import train
from gcvit.config import train_cli
from gcvit.config.load import load_config
from gcvit.config.schema import Config, EmaConfig
from gcvit.errors import UserError
from tests.helpers.launching import ROOT

CONFIG = str(ROOT / "tests/helpers/golden.yaml")
TRAIN_FLAGS = [
    (("--data_dir", "--data-dir"), "/data/imagenet", "data_dir", "/data/imagenet"),
    (("--batch-size", "--batch_size"), "16", "batch_size", 16),
    (("--batch-size", "--batch_size"), "auto", "batch_size", "auto"),
    (("--tag",), "my-run", "tag", "my-run"),
    (("--model-ema", "--model_ema"), None, "model_ema", True),
    (("--resume",), "runs/a/checkpoints/step_00000010", "resume", "runs/a/checkpoints/step_00000010"),
    (("--resume",), "none", "resume", "none"),
    (("--init-from", "--init_from"), "gc_vit_tiny", "init_from", "gc_vit_tiny"),
    (("--reset-head", "--reset_head"), None, "reset_head", True),
    (("--replay",), "7", "replay", 7),
    (("--plan",), None, "plan", True),
    (("--overfit-one-batch",), None, "overfit_one_batch", True),
    (("--local_rank", "--local-rank"), "3", "local_rank", "3"),
]
EVALUATE_FLAGS = [
    (("--batch-size", "--batch_size"), "16", "batch_size", (16,)),
    (("--model",), "gc_vit_tiny", "model", "gc_vit_tiny"),
    (("--checkpoint",), "weights.pth.tar", "checkpoint", ["weights.pth.tar"]),
    (("--weights",), "both", "weights", "both"),
    (("--img-size", "--img_size"), "224,256", "img_size", (224, 256)),
    (("--tta",), "ten-crop", "tta", "ten-crop"),
    (("--benchmark",), None, "benchmark", True),
    (("--split",), "test", "split", "test"),
    (("--local_rank", "--local-rank"), "3", "local_rank", "3"),
]


@pytest.fixture
def parse(monkeypatch) -> Callable[..., Namespace]:
    """`parse(train, *words)`: what a script makes of its command line."""

    def parse_words(script, *words: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", [script.__file__, *words])
        return script.parse_arguments()

    return parse_words


@pytest.fixture
def configure(monkeypatch) -> Callable[..., Config]:
    """`configure(*words)`: the config that train.py's main makes, stopped before it opens the data."""

    class Stop(Exception):
        pass

    def stop(config: Config):
        raise Stop(config)

    def make_config(*words: str) -> Config:
        monkeypatch.setattr(sys, "argv", [train.__file__, "--config", CONFIG, *words])
        monkeypatch.setattr("gcvit.monitoring.writers.check_wandb", stop)
        monkeypatch.setitem(sys.modules, "gcvit.training.setup", SimpleNamespace(build_trainer=None))
        monkeypatch.setitem(sys.modules, "gcvit.training.replay", SimpleNamespace(replay=None))
        with pytest.raises(Stop) as stopped:
            train.main()
        return stopped.value.args[0]

    return make_config


def forms(spelling: str, value: str | None) -> list[list[str]]:
    return [[spelling]] if value is None else [[spelling, value], [f"{spelling}={value}"]]


@pytest.mark.parametrize(("spellings", "value", "name", "wanted"), TRAIN_FLAGS)
def test_every_spelling_of_a_flag_of_train_is_read_alike(parse, spellings, value, name, wanted):
    plain = vars(parse(train, "--config", CONFIG))
    assert plain[name] != wanted
    for spelling in spellings:
        for words in forms(spelling, value):
            assert vars(parse(train, "--config", CONFIG, *words)) == plain | {name: wanted}, words


@pytest.mark.parametrize(("spellings", "value", "name", "wanted"), EVALUATE_FLAGS)
def test_every_spelling_of_a_flag_of_evaluate_is_read_alike(parse, spellings, value, name, wanted):
    plain = vars(parse(evaluate, "--data_dir", "data"))
    assert plain[name] != wanted
    for spelling in spellings:
        for words in forms(spelling, value):
            assert vars(parse(evaluate, "--data_dir", "data", *words)) == plain | {name: wanted}, words
    assert vars(parse(evaluate, "--data-dir", "data")) == plain
    assert plain["data_dir"] == ["data"]


def test_what_is_left_out_is_absent(parse):
    assert vars(parse(train, "--config", "a.yaml")) == {
        "config": "a.yaml",
        "data_dir": None,
        "batch_size": None,
        "tag": None,
        "model_ema": False,
        "resume": "auto",
        "init_from": None,
        "reset_head": False,
        "replay": None,
        "plan": False,
        "overfit_one_batch": False,
        "gpus": None,
        "gpu": None,
        "mfu": None,
        "local_rank": None,
        "overrides": [],
    }
    found = parse(evaluate, "runs/a", "--data_dir", "data")
    assert (found.runs, found.split, found.batch_size, found.weights) == (["runs/a"], None, None, None)


def test_what_a_plan_is_for(parse, capsys):
    plain = vars(parse(train, "--config", CONFIG, "--plan"))
    found = vars(parse(train, "--config", CONFIG, "--plan", "--gpus", "32", "--gpu", "h100-80", "--mfu", "0.4"))
    assert found == plain | {"gpus": 32, "gpu": "h100-80", "mfu": 0.4}
    with pytest.raises(SystemExit):
        parse(train, "--config", CONFIG, "--plan", "--replay", "7")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "32"], "--gpus belongs to a plan"),
        (["--gpus", "0"], "--gpus belongs to a plan"),
        (["--gpu", "l4", "--replay", "3"], "--gpu belongs to a plan"),
        (["--mfu", "0.4", "--overfit-one-batch"], "--mfu belongs to a plan"),
        (["--plan", "--resume", "none"], "--resume belongs to a training"),
        (["--overfit-one-batch", "--init-from", "gc_vit_tiny"], "--init-from belongs to a training"),
        (["--overfit-one-batch", "--reset-head"], "--reset-head belongs to a training"),
        (["--overfit-one-batch", "--resume", "none"], "--resume belongs to a training"),
        (["--plan", "--init-from", "gc_vit_tiny"], "--init-from belongs to a training"),
        (["--plan", "--reset-head"], "--reset-head belongs to a training"),
        (["--overfit-one-batch", "--batch-size", "auto"], "--batch-size has no effect on --overfit-one-batch"),
        (["--overfit-one-batch", "--model-ema"], "--model-ema has no effect on --overfit-one-batch"),
        (["--overfit-one-batch", "--tag", "a"], "--tag has no effect on --overfit-one-batch"),
        (["--data_dir", ""], "--data_dir is empty; hint: give a folder"),
    ],
)
def test_a_flag_without_effect_is_refused(parse, words, told):
    with pytest.raises(UserError, match=told):
        train_cli.check(parse(train, "--config", CONFIG, *words))


def test_overrides_may_stand_between_flags(parse):
    found = parse(train, "seed=1", "--config", CONFIG, "optim.lr=1e-3", "--tag", "a", "ema=null")
    assert found.overrides == ["seed=1", "optim.lr=1e-3", "ema=null"]
    assert found.tag == "a"


@pytest.mark.parametrize("words", [["--batch", "8"], ["--batch-size", "many"], ["--no-such-flag"], ["--tag"]])
def test_what_is_no_flag_is_refused(parse, words, capsys):
    for script, needed in ((train, ["--config", CONFIG]), (evaluate, ["--data_dir", "data"])):
        with pytest.raises(SystemExit) as stopped:
            parse(script, *needed, *words)
        assert stopped.value.code == 2
        told = capsys.readouterr().err
        assert words[0] in told
        assert len(told.splitlines()) == 2, "usage, and what is wrong"


# ---- into the config -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spellings", "value", "override"),
    [
        (("--data_dir", "--data-dir"), "/data/imagenet", "data.dir=/data/imagenet"),
        (("--batch-size", "--batch_size"), "16", "trainer.micro_batch_size=16"),
        (("--tag",), "my-run", "tag=my-run"),
        # Digits stay a text, as the shell's user meant them.
        (("--tag",), "20261122", "tag='20261122'"),
        (("--data_dir", "--data-dir"), "2012", "data.dir='2012'"),
    ],
)
def test_a_flag_sets_its_option(configure, spellings, value, override):
    wanted = load_config(CONFIG, [override])[0]
    assert wanted != load_config(CONFIG)[0]
    for spelling in spellings:
        for words in forms(spelling, value):
            assert configure(*words) == wanted, words


@pytest.mark.parametrize("spelling", ["--model-ema", "--model_ema"])
def test_model_ema_switches_the_average_on_and_leaves_one_alone(configure, spelling):
    assert configure("ema=null").ema is None
    assert configure(spelling, "ema=null").ema == EmaConfig()
    assert configure(spelling).ema == EmaConfig(half_life="5 steps") != EmaConfig()


@pytest.mark.parametrize(
    "words", [["--resume", "none"], ["--init-from", "a.pth"], ["--init_from", "a.pth"], ["--local_rank", "1"], []]
)
def test_the_other_flags_change_no_option(configure, words):
    assert configure(*words) == load_config(CONFIG)[0]


def test_an_override_goes_over_a_flag(configure):
    assert configure("--batch-size", "16", "trainer.micro_batch_size=8").trainer.micro_batch_size == 8


def test_a_flag_out_of_range_is_the_users_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", [train.__file__, "--config", CONFIG, "--batch-size", "0"])
    with pytest.raises(UserError, match=r"micro_batch_size.*got 0"):
        train.main()
