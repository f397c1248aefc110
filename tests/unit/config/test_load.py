"""The config: what is read as what, what is refused and in which words, and how the parts override each
other."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from gcvit.config.load import RENAMED, dump_config, load_config, parse_config, parse_yaml
from gcvit.config.schema import Config, MixConfig, Section
from gcvit.errors import UserError

MINIMAL = """
tag: test
global_batch_size: 64
model: {name: gc_vit_xxtiny}
optim: {lr: 1e-3}
schedule: {cosine: 300 epochs}
"""


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5e-6", "1e3", "+1E3", "-2e-1", ".5e1", "5.e-6", "5.0e-6"])
def test_yaml_reads_exponents_as_numbers(text):
    assert parse_yaml(text) == float(text)


@pytest.mark.parametrize("text", ["5e-6x", "e5", "-e-5", "1e", "rand-m9-mstd0.5-inc1", "1e6 samples", '"5e-6"'])
def test_yaml_leaves_texts_alone(text):
    assert parse_yaml(text) == text.strip('"')


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_yaml_reads_any_float_that_python_writes(value):
    assert parse_yaml(repr(value)) == value
    assert parse_yaml(f"{value:.17e}") == value


def test_yaml_makes_no_objects():
    with pytest.raises(yaml.YAMLError):
        parse_yaml("!!python/object/apply:os.getcwd []")


def test_a_minimal_file_has_the_published_defaults(path):
    config, notices = load_config(path)
    assert notices == []
    assert config.run_dir == Path("runs/test")
    assert (config.optim.lr, config.optim.min_lr, config.optim.clip_norm) == (1e-3, 5e-6, 5.0)
    assert config.augment.mix == MixConfig(mixup=0.8, cutmix=1.0)


def test_every_knob_has_a_sentence():
    def check(section: type[Section]) -> int:
        for name, field in section.model_fields.items():
            for option in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(option, type) and issubclass(option, Section):
                    check(option)
                    break
            else:
                assert field.description, f"{section.__name__}.{name}"

    check(Config)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a\n- b", "must be a mapping"),
        (b"", "must be a mapping"),
        (b"a: [", "no YAML"),
        (b"\xff\xfe\xfa", "no YAML"),
        (b"tag: 2024-01-01", "unknown kind"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, words):
    (tmp_path / "bad.yaml").write_bytes(content)
    message = refusal(tmp_path / "bad.yaml")
    assert words in message
    assert str(tmp_path / "bad.yaml") in message


def test_a_missing_file(tmp_path):
    assert "cannot read the config: got" in refusal(tmp_path / "absent.yaml")


# ---- refusing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optim.lrr=1e-3", "optim.lr?"),
        ("optim.weight_deacy=0.1", "optim.weight_decay?"),
        ("engin=ddp", "engine?"),
        ("augment.mix.mixupp=0.1", "augment.mix.mixup?"),
        ("zero.stages=2", "zero.stage?"),
        ("augment.affine.degree=3", "augment.affine.degrees?"),
    ],
)
def test_an_unknown_key_names_the_nearest(path, override, nearest):
    message = refusal(path, override)
    key = override.partition("=")[0]
    assert message.startswith("unknown config key: got the command line: ")
    assert key in message
    assert "expected: " in message
    assert f"hint: did you mean {nearest}" in message


@pytest.mark.parametrize(
    ("override", "got"),
    [
        ('optim.lr="1e-3"', "'1e-3'"),
        ("optim.lr=fast", "'fast'"),
        ("optim.lr=0", "0"),
        ("optim.lr=-1e-3", "-0.001"),
        ("optim.lr=true", "True"),
        ("optim.lr=null", "None"),
        ("optim.lr=.inf", "inf"),
        ("optim.betas=0.9", "0.9"),
        ("optim.betas=[0.9, 1.0]", "1.0"),
        ("seed=1.5", "1.5"),
        ("seed=-1", "-1"),
        ("global_batch_size=true", "True"),
        ("global_batch_size=64.5", "64.5"),
        ("global_batch_size=0", "0"),
        ("engine=horovod", "'horovod'"),
        ("tag=../up", "'../up'"),
        ("tag=7", "7"),
        ("zero.stage=4", "4"),
        ("schedule.cosine=300", "300"),
        ("schedule.cosine=300 epoch s", "'300 epoch s'"),
        ("schedule.cosine=-3 epochs", "'-3 epochs'"),
        ("augment.hflip=1.5", "1.5"),
        ("augment.mix.group_size=3", "3"),
        ("model=gc_vit_tiny", "'gc_vit_tiny'"),
        ("data=[1]", "[1]"),
    ],
)
def test_a_wrong_value_says_what_got_expected(path, override, got):
    engine = ["engine=zero"] if override.startswith("zero") else []
    message = refusal(path, *engine, override)
    assert override.partition("=")[0] in message
    assert f"got {got}" in message
    assert "; expected: " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine=ddp", "zero.stage=2"], ["zero", "no effect", "engine=ddp"]),
        (["engine=zero", "fsdp.reshard_after_forward=false"], ["fsdp", "no effect", "engine=zero"]),
        (["augment.color_jitter=0.4"], ["color_jitter", "no effect", "rand_augment"]),
        (["augment.mix.cutmix=0", "augment.mix.switch_prob=0.5"], ["switch_prob", "no effect"]),
        (["augment.mix.cutmix=0", "augment.mix.mixup=0"], ["augment.mix=null"]),
        (["global_batch_size=63"], ["global_batch_size", "even"]),
        (["augment.scale=[0.9, 0.1]"], ["scale", "low"]),
        (["augment.affine.scale=[1.5, 0.5]"], ["scale", "low"]),
        (["engine=zero", "zero.stage=3", "compile=true"], ["compile=true", "zero.stage=3", "engine=fsdp"]),
        (["optim.min_lr=0.1"], ["min_lr", "above lr", "lower it"]),
        (["engine=zero", "zero.offload_optimizer=nvme"], ["offload_optimizer", "cpu"]),
        (["engine=zero", "zero.stage=0"], ["stage 0", "engine=ddp"]),
        (["engine=zero", "zero.offload_parameters=cpu"], ["offload_parameters", "no effect", "stage 3"]),
        (["activation_checkpointing=budget"], ["activation_budget_bytes", "both or neither"]),
        (["activation_budget_bytes=1000"], ["activation_budget_bytes", "both or neither"]),
    ],
)
def test_a_knob_without_effect_and_knobs_that_contradict(path, overrides, words):
    message = refusal(path, *overrides)
    for word in words:
        assert word in message


def test_a_missing_key(tmp_path):
    (tmp_path / "run.yaml").write_text(MINIMAL.replace("optim: {lr: 1e-3}", ""))
    message = refusal(tmp_path / "run.yaml")
    assert "missing" in message
    assert "optim" in message


def test_a_half_life_of_nothing_is_refused(path):
    assert "ema.half_life" in refusal(path, "ema.half_life=0 steps")


def test_an_override_that_has_a_knob_of_its_own_is_refused(path):
    assert "num_classes" in refusal(path, "model.overrides={num_classes: 10}")


def test_only_the_first_of_many_mistakes_is_told_and_the_others_counted(path):
    message = refusal(path, "optim.lrr=1", "optim.epss=1", "tagg=x")
    assert "2 more" in message


# ---- overriding ----------------------------------------------------------------------------------


def test_overrides_win_over_flags_over_the_file(path):
    flags = {"tag": "flag", "data.dir": "flag", "trainer.micro_batch_size": None}
    config, _ = load_config(path, ["tag=override"], flags)
    assert (config.tag, config.data.dir, config.trainer.micro_batch_size) == ("override", "flag", None)


def test_overrides_are_yaml(path):
    config, _ = load_config(
        path,
        [
            "optim.min_lr=5e-7",
            "augment.mix=null",
            "optim.clip_norm=null",
            "model.overrides.depths=[1, 1, 1, 1]",
        ],
    )
    assert config.optim.min_lr == 5e-7
    assert config.augment.mix is None
    assert config.optim.clip_norm is None
    assert config.model.overrides.depths == (1, 1, 1, 1)


def test_an_absent_section_springs_up_with_its_first_option(path):
    assert load_config(path)[0].ema is None
    config, _ = load_config(path, ["ema.half_life=5 steps", "engine=zero", "zero.stage=3"])
    assert config.ema is not None
    assert config.ema.half_life == "5 steps"
    assert config.zero is not None
    assert config.zero.stage == 3


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim lr=3", "--flag=3", "optim.lr=[1"])
def test_an_override_that_cannot_be_read(path, override):
    assert refusal(path, override).startswith("cannot read an override")


@pytest.mark.parametrize(("scaling", "lr"), [("none", 1e-3), ("sqrt", 2e-3), ("linear", 4e-3)])
def test_the_learning_rate_follows_a_changed_batch_as_told(path, scaling, lr):
    config, notices = load_config(path, ["global_batch_size=256", f"optim.lr_scaling={scaling}"])
    assert config.optim.lr == pytest.approx(lr)
    assert len(notices) == 1
    for word in ("256", "64", scaling, f"{lr:g}"):
        assert word in notices[0]


def test_an_unchanged_batch_scales_nothing_and_says_so_where_it_was_asked_to(path):
    config, notices = load_config(path, ["optim.lr_scaling=linear", "global_batch_size=64"])
    assert config.optim.lr == 1e-3
    assert len(notices) == 1
    assert "optim.lr_scaling=linear changes nothing" in notices[0]
    assert load_config(path, ["optim.lr_scaling=none", "global_batch_size=64"])[1] == []


def test_a_rate_that_is_scaled_below_its_floor_is_refused(path):
    assert "optim.min_lr" in refusal(path, "optim.lr_scaling=linear", "global_batch_size=32", "optim.min_lr=6e-4")
    assert load_config(path, ["optim.lr_scaling=sqrt", "global_batch_size=32", "optim.min_lr=6e-4"])[1]
    for scaling, floor, hint in (("linear", "6e-4", "sqrt"), ("linear", "9e-4", "none"), ("sqrt", "9e-4", "none")):
        told = refusal(path, f"optim.lr_scaling={scaling}", "global_batch_size=32", f"optim.min_lr={floor}")
        assert told.endswith(f"or take optim.lr_scaling={hint}")


def test_a_bad_batch_in_the_file_may_be_overridden(tmp_path):
    (tmp_path / "run.yaml").write_text(MINIMAL.replace("64", "0"))
    assert load_config(tmp_path / "run.yaml", ["global_batch_size=64"])[0].global_batch_size == 64


# ---- writing -------------------------------------------------------------------------------------


@given(
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**63),
    tag=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    directory=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20),
    ema=st.booleans(),
    stage=st.none() | st.sampled_from([1, 2, 3]),
)
@example(lr=5e-6, seed=0, tag="1e5", directory="0E0", ema=True, stage=None)  # texts that look like numbers
def test_a_dump_reads_back_to_an_equal_config(tmp_path_factory, lr, seed, tag, directory, ema, stage):
    tree = parse_yaml(MINIMAL) | {"tag": tag, "seed": seed, "data": {"dir": directory}}
    tree["optim"] = {"lr": lr, "min_lr": 0.0}
    tree["ema"] = {"half_life": "5 steps"} if ema else None
    if stage:
        tree |= {"engine": "zero", "zero": {"stage": stage}}
    config = parse_config(tree, source="here")
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == (config, [])
    # And as a checkpoint keeps it.
    assert parse_config(json.loads(json.dumps(config.model_dump(mode="json"))), source="here") == config


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_option_is_refused_with_its_new_name(path, old, new):
    with pytest.raises(UserError, match=rf"renamed: got the command line: {old}; expected: {new}"):
        load_config(path, [f"{old}=1"])
    assert load_config(path, [f"{new}=1"])
