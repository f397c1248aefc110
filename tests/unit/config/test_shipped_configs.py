"""Every file in configs/: it loads, is short, gives command, result and cost, and has the published numbers."""

import math
import re
from pathlib import Path

import pytest
import yaml

from gcvit.config.load import load_config, parse_config, parse_yaml
from gcvit.config.schema import Config
from gcvit.errors import UserError
from gcvit.optim.lr_schedule import build_schedule, to_samples
from tests.helpers.resolved_configs import RESOLVED, resolve_configs

FOLDER = Path(__file__).parents[3] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
SIZES = ("xxtiny", "xtiny", "tiny", "tiny2", "small", "small2", "base", "large")
RECIPES = {
    *(f"gc_vit_{size}" for size in SIZES),
    *(f"gc_vit_{size}_{engine}" for size in ("base", "large") for engine in ("fsdp", "zero")),
}
FINE_TUNING = {"gc_vit_large_finetune", "gc_vit_large_384", "gc_vit_large_512"}
OWN_DATA = {"digits_demo", "gc_vit_xxtiny_finetune"}
# timm's results-imagenet.csv, at 224 pixels; timm has no other variant.
TIMM_TOP1 = {
    "gc_vit_xxtiny": "79.756",
    "gc_vit_xtiny": "81.964",
    "gc_vit_tiny": "83.400",
    "gc_vit_small": "83.904",
    "gc_vit_base": "84.456",
}
NUM_IMAGES = 1_281_167  # ImageNet-1K, train

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
each_recipe = pytest.mark.parametrize("name", sorted(RECIPES))


def read_head(path: Path) -> str:
    """The comment before the first key, without its marks, on one line."""
    lines = path.read_text().split("\n\n", 1)[0].splitlines()
    assert all(line.startswith("#") for line in lines)
    return " ".join(line.lstrip("# ").rstrip("\\ ") for line in lines)


def find_redundant(tree: dict) -> list[str]:
    """Options of a config that equal their defaults, by dotted key: without them it resolves to the same."""
    expected = parse_config(tree, "all of it")
    redundant = []
    for path in find_leaves(tree):
        try:
            is_same = parse_config(remove(tree, path), "without it") == expected
        except UserError:  # it must be given
            is_same = False
        if is_same:
            redundant.append(".".join(path))
    return redundant


def remove(tree: dict, path: tuple[str, ...]) -> dict:
    """The tree without an option, and without the section that held nothing else."""
    name, *rest = path
    inner = remove(tree[name], tuple(rest)) if rest else {}
    others = {key: value for key, value in tree.items() if key != name}
    return {**others, name: inner} if inner else others


def find_leaves(tree: dict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all options that are no sections."""
    leaves = []
    for name, value in tree.items():
        path = (*prefix, name)
        leaves += find_leaves(value, path) if isinstance(value, dict) else [path]
    return leaves


def sizes(config: Config) -> dict[str, int]:
    return {"global_batch_size": config.global_batch_size, "samples_per_epoch": NUM_IMAGES}


def test_there_is_a_file_for_every_published_run():
    assert {path.stem for path in FILES} == RECIPES | FINE_TUNING | OWN_DATA


@each_file
def test_loads_without_notices(path):
    config, notices = load_config(path)
    assert notices == []
    assert config.tag == path.stem


def test_no_recipe_changes_silently():
    expected = yaml.safe_load(RESOLVED.read_text())
    resolved = resolve_configs()
    assert resolved.keys() == expected.keys()
    for name in expected:
        assert resolved[name] == expected[name], "meant so? python -m tests.helpers.resolved_configs"


@each_file
def test_holds_what_differs_from_the_defaults(path):
    assert len(path.read_text().splitlines()) <= 30
    # Every file names its engine; fsdp.shard_size has a comment that says when to change it.
    assert set(find_redundant(parse_yaml(path.read_text()))) <= {"engine", "fsdp.shard_size"}


def test_a_redundant_option_is_noticed():
    tree = parse_yaml((FOLDER / "gc_vit_large.yaml").read_text())
    tree |= {"seed": 0, "wandb": False, "augment": {"hflip": 0.5, "mix": {"prob": 0.9, "switch_prob": 0.5}}}
    redundant = ["seed", "wandb", "augment.hflip", "augment.mix.switch_prob"]
    assert find_redundant(tree) == ["engine", "fsdp.shard_size", *redundant]


@each_file
def test_head_tells_command_result_and_cost(path):
    head = read_head(path)
    assert re.search(r"Launch: +(.*)Expected: +(.*)Cost: +(.*)", head)
    assert f"train.py --config configs/{path.name} --data_dir" in head


@each_file
def test_agrees_with_the_table_of_variants(path):
    from gcvit.model.variants import VARIANTS  # not above: it loads torch

    config, _ = load_config(path)
    variant = VARIANTS[config.model.name]
    if path.stem in OWN_DATA:
        return
    assert config.model.img_size == variant.img_size
    assert config.model.drop_path == variant.drop_path_rate
    assert config.data.crop_pct == variant.crop_pct
    assert config.data.eval_resize == {"center": "crop", "squash": "squash"}[variant.crop_mode]
    head = read_head(path)
    # The variants' table has what was trained on ImageNet-1K alone for this size.
    top1 = 86.6 if path.stem == "gc_vit_large_finetune" else variant.published_top1
    assert f"Expected: {top1} % top-1" in head
    assert "(published; we have not measured it)" in head
    timm_top1 = TIMM_TOP1.get(config.model.name)
    assert re.findall(r"timm measured ([\d.]+) % with the published weights", head) == (
        [timm_top1] if timm_top1 else []
    )
    assert f"({variant.num_params / 1e6:.1f} M parameters)" in head


@each_file
def test_cost_is_the_arithmetic_it_says(path):
    from gcvit.model.variants import VARIANTS

    if path.stem in OWN_DATA:
        return
    config, _ = load_config(path)
    schedule = build_schedule(config.schedule, config.optim, **sizes(config))
    epochs = schedule.total_steps * config.global_batch_size / NUM_IMAGES
    passes = 4 if config.activation_checkpointing == "full" else 3
    exaflop = passes * 2 * VARIANTS[config.model.name].counted_gmacs * 1e9 * NUM_IMAGES * epochs / 1e18
    told = re.search(r"not measured; ([\d.]+) EFLOP: (\d) ", read_head(path))
    assert told
    assert float(told[1]) == pytest.approx(exaflop, rel=5e-3)
    assert int(told[2]) == passes


@each_recipe
def test_recipes_have_the_published_numbers(name):
    config, _ = load_config(FOLDER / f"{name}.yaml")
    small = config.model.name.removeprefix("gc_vit_") in ("xxtiny", "xtiny", "tiny", "tiny2")
    assert config.global_batch_size == (4096 if small else 1024)
    schedule = build_schedule(config.schedule, config.optim, **sizes(config))
    steps_per_epoch = NUM_IMAGES / config.global_batch_size
    assert schedule.total_steps / steps_per_epoch == pytest.approx(320, abs=0.01)
    # The rate at the start of these epochs, as the published schedule has it.
    rates = {epoch: schedule.lr(round(epoch * steps_per_epoch)) for epoch in (0, 19, 20, 312)}
    assert rates == pytest.approx({0: 1e-6, 19: 4.75e-3, 20: 4.949e-3, 312: 5e-6}, rel=1e-3)
    assert config.ema is not None
    half_life_steps = to_samples(config.ema.half_life, **sizes(config)) / config.global_batch_size
    assert math.exp(math.log(0.5) / half_life_steps) == pytest.approx(0.9998, abs=1e-6)


@each_recipe
def test_recipes_differ_only_where_they_say(name):
    """One recipe: what does not depend on the size or on the hardware is the same in all files."""

    def common(name: str) -> dict:
        tree = load_config(FOLDER / f"{name}.yaml")[0].model_dump()
        for key in ("tag", "engine", "fsdp", "zero", "activation_checkpointing", "model", "trainer"):
            del tree[key]
        del tree["global_batch_size"], tree["ema"]  # these two: 4096 or 1024, checked above
        del (
            tree["data"]["crop_pct"],
            tree["data"]["shuffle_chunks"],
        )  # the more samples of a lane in a batch, the more chunks are mixed
        return tree

    assert common(name) == common("gc_vit_large")


def test_the_demo_accepts_every_engine():
    for engine, overrides in {"ddp": [], "fsdp": [], "zero": ["zero.stage=2"]}.items():
        config, _ = load_config(FOLDER / "digits_demo.yaml", [f"engine={engine}", *overrides])
        assert config.engine == engine


@pytest.mark.parametrize("name", sorted(FINE_TUNING | {"gc_vit_xxtiny_finetune"}))
def test_fine_tuning_begins_with_a_new_head(name):
    """And with what suits given weights: the early layers learn slowly, and nothing but the head while it is random."""
    config, _ = load_config(FOLDER / f"{name}.yaml")
    assert re.search(r"--init-from \S+ --reset-head", read_head(FOLDER / f"{name}.yaml"))
    assert config.optim.layer_decay == 0.9
    schedule = build_schedule(config.schedule, config.optim, **sizes(config))
    assert 0 < schedule.frozen_steps <= schedule.warmup_steps
