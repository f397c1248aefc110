"""A model card says what is known of the weights, in the hub's format; and where weights come from is not lost."""

import json

import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import ModelCard

from gcvit.checkpoint import store
from gcvit.checkpoint.store import RunState
from gcvit.checkpoint.weights_source import describe_origin
from gcvit.config.load import load_config
from gcvit.export.model_card import read_records, write_card
from gcvit.export.timm_hub import export
from gcvit.model import VARIANTS
from gcvit.model.summary import Row
from tests.helpers.launching import ROOT
from tests.unit.export.test_timm_hub import STATE, save_run, world  # noqa: F401  (a fixture)

TUNED = "the published weights of gc_vit_xxtiny"
RESULT = {"top1": 81.25, "top5": 95.5, "ece": 0.03, "num_samples": 360}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):  # noqa: F811
    return save_run(tmp_path_factory.mktemp("run"), world)[0]


def make_record(**changes):
    made = {"name": "val", "weights": "ema", "checkpoint": {"path": "p", "step": STATE.step}, "result": RESULT}
    return {**made, "options": {"img_size": [32], "crop_pct": 0.9, "resize": "crop", "tta": "flip"}, **changes}


def write_records(run, **records) -> None:
    (run / "evaluations").mkdir(exist_ok=True)
    for name, record in records.items():
        (run / "evaluations" / f"{name}.json").write_text(json.dumps(record))


def make_card(*overrides, kind="ema", state=STATE, records=()):
    config, _ = load_config(ROOT / "tests/helpers/golden.yaml", overrides)
    return write_card(config, "gcvit_xxtiny", kind, state, records, ["a", "b"])


def test_an_export_has_a_card_that_the_hub_reads(run, tmp_path):
    write_records(run, val=make_record())
    export(run, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert card.data.license is None
    found = {result.metric_name: (result.dataset_name, result.metric_value) for result in card.data.eval_results}
    assert found == {"top-1 (%)": ("val", 81.25), "top-5 (%)": ("val", 95.5)}
    assert "| val | 81.250 | 95.500 | 0.0300 | 360 | 32, 0.9, crop, flip |" in card.text
    assert "somewhere" not in card.text  # the data's folder
    with torch.device("meta"):
        num_params = (
            sum(fragment.numel() for fragment in store.open_checkpoint(next(run.glob("*/step_*"))).shapes.values()) // 2
        )
    assert f"| parameters | {num_params:,} |" in card.text
    assert "| input | 32 × 32 pixels" in card.text
    assert "224 images in 7 updates of 32, in fp32" in card.text
    assert "a moving average over training, half-life 5 steps" in card.text
    assert "import gcvit.model" in card.text  # timm has no such architecture


@pytest.fixture
def uncounted(monkeypatch):
    """The model's own numbers are looked at above; counting them takes most of a card's time."""
    monkeypatch.setattr("gcvit.export.model_card.summarize", lambda model: [Row("all", 1, 1.0, 1)])


@pytest.mark.usefixtures("uncounted")
def test_results_of_other_weights_are_left_out(run):
    other_step = make_record(checkpoint={"path": "p", "step": STATE.step + 1})
    write_records(run, val=make_record(), raw=make_record(weights="model"), old=other_step, none={"a": 1}, nan=[])
    assert read_records(run, "ema", STATE) == [make_record()]
    assert [record["weights"] for record in read_records(run, "model", STATE)] == ["model"]
    assert "None are known" in make_card()
    assert "eval_results" not in make_card()


@pytest.mark.usefixtures("uncounted")
def test_the_best_of_a_run_is_told_where_it_is_that(run):
    best = RunState(step=7, samples=224, best_top1=71.5, best_step=7)
    assert "top-1 71.500 % on val" in make_card(state=best)
    assert "71.500" not in make_card(state=best, kind="model")  # it was the EMA's
    assert "71.500" not in make_card(state=RunState(step=8, samples=256, best_top1=71.5, best_step=7))


@pytest.mark.usefixtures("uncounted")
def test_the_licence_is_the_users_to_state_but_for_published_weights():
    own = make_card()
    assert "license" not in yaml.safe_load(own.split("---")[1])
    assert "None is stated yet" in own
    tuned = make_card(state=RunState(step=7, samples=224, initial_weights=TUNED))
    assert yaml.safe_load(tuned.split("---")[1])["license"] == "cc-by-nc-sa-4.0"
    assert "**not for commercial use**" in tuned
    assert f"Initial weights: {TUNED}." in tuned


@pytest.mark.usefixtures("uncounted")
def test_the_recipe_in_words_follows_the_config():
    plain = make_card("augment.mix=null", "augment.erase_prob=0", "ema=null", "schedule.warmup=3 steps", kind="model")
    assert "mixup" not in plain
    assert "erasing" not in plain
    assert "of which 3 steps warm up" in plain
    assert "not averaged" in plain
    assert "warm up" not in make_card()
    assert "for 2 steps" in make_card("optim.frozen_backbone=2 steps")


@pytest.mark.parametrize("name", ["gc_vit_tiny", "gc_vit_large_512"])
def test_published_weights_are_known_by_name_and_by_file(name, tmp_path):
    assert describe_origin(name) == f"the published weights of {name}"
    assert describe_origin(str(tmp_path / VARIANTS[name].weights_file)) == f"the published weights of {name}"


@pytest.mark.usefixtures("uncounted")
def test_an_origin_survives_runs_and_exports(world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tests.unit.export.test_timm_hub.STATE", RunState(step=7, samples=224, initial_weights=TUNED))
    run, _ = save_run(tmp_path / "run", world)
    export(run)
    for source, own in (
        (run, "those of golden at step 7"),
        (run / "export/model.safetensors", "those of model.safetensors"),
    ):
        assert describe_origin(str(source)) == f"{own}, which began with {TUNED}"
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "mine.safetensors")
    assert describe_origin(str(tmp_path / "mine.safetensors")) == "those of mine.safetensors"
    assert str(tmp_path) not in (run / "export/README.md").read_text()
