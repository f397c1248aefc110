"""Norms of parameters and gradients by stage, in a world of one; of shards: tests/integration/test_norms.py."""

import copy

import numpy as np
import pytest
import torch

from gcvit.config.load import load_config
from gcvit.monitoring.norms import Norms
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from tests.helpers.launching import ROOT
from tests.helpers.norms_worker import STAGES, Shown, true_norms

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("clip_norm", [None, 0.01, 100.0])
def test_they_are_those_of_the_step_before_clipping(clip_norm, world):
    """Also where the row comes after other steps, whose gradients are clipped otherwise."""
    clip = "null" if clip_norm is None else clip_norm
    config, _ = load_config(ROOT / "tests/helpers/golden.yaml", [f"optim.clip_norm={clip}"])
    engine = build_engine(config, world, num_micro_steps=1)
    engine.module.train()
    norms, shown = Norms(engine, config.optim, lambda step: step == 2), Shown()
    random = torch.Generator().manual_seed(0)
    wanted = {}
    for step in range(3):
        images = torch.randn(32, 3, 32, 32, generator=random).to(world.device)
        targets = torch.randn(32, 4, generator=random).softmax(1).to(world.device) * (step + 1)
        twin = copy.deepcopy(engine.module)
        engine.backward(soft_target_loss(engine(images), targets).sum())
        norms.measure(step, lambda: engine.step(1e-3))
        if step == 1:
            soft_target_loss(twin(images), targets).mean().backward()
            wanted = true_norms(engine.module, twin)
    norms.log(shown)
    norms.log(shown)  # shows them once
    assert [(step, kind) for step, kind, _ in shown] == [(2, "parameter_norms"), (2, "gradient_norms")]
    for _, kind, of_stages in shown:
        assert list(of_stages) == STAGES
        for stage, values in of_stages.items():
            np.testing.assert_allclose(values, wanted[kind][stage], rtol=1e-4, atol=1e-7, err_msg=stage)


def test_a_refused_update_has_no_gradient(world):
    config, _ = load_config(ROOT / "tests/helpers/golden.yaml")
    engine = build_engine(config, world, num_micro_steps=1)
    norms, shown = Norms(engine, config.optim, lambda step: True), Shown()
    engine.backward(engine(torch.randn(32, 3, 32, 32, device=world.device)).sum() * torch.nan)
    norms.measure(0, lambda: engine.step(1e-3))
    norms.log(shown)
    assert [kind for _, kind, _ in shown] == ["parameter_norms"]
