"""The model as engines and timm's tools use it."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gcvit.errors import UserError
from gcvit.model import attention, create_model
from gcvit.model.gcvit import GCViT

SMALL: dict[str, Any] = {
    "width": 16,
    "depths": [2, 2, 3, 2],
    "num_heads": [1, 2, 4, 8],
    "img_size": 64,
    "num_classes": 5,
}


def build_model(name: str = "gc_vit_small", **arguments: Any) -> GCViT:
    return create_model(name, **(SMALL | {"drop_path_rate": 0.0, "layer_scale": 0.5} | arguments))


def test_logits_do_not_depend_on_the_rest_of_the_batch() -> None:
    assert batch_dependence() < 1e-12


def test_image_minor_tiling_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic mistake: all queries repeated, (0,1,2,0,1,2,...), for image-major windows."""
    num_windows_of_stage = {16: 64, 32: 16, 64: 1, 128: 1}  # by the stage's width

    def tile_image_minor(queries_bwwc: Tensor, num_heads: int) -> Tensor:
        num_images, window, _, num_channels = queries_bwwc.shape
        num_windows = num_windows_of_stage[num_channels]
        queries = queries_bwwc.reshape(num_images, window**2, num_heads, -1).transpose(1, 2)
        return queries.repeat(num_windows, 1, 1, 1).view(num_images, num_windows, *queries.shape[1:])

    monkeypatch.setattr(attention, "share_queries", tile_image_minor)
    assert batch_dependence() > 1e-4


def batch_dependence() -> float:
    """The largest change of an image's logits when other images stand beside it."""
    model = build_model().double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # initial bias tables and heads are almost nil
            parameter.mul_(10.0 if name.endswith(("qkv.weight", "head.fc.weight")) else 1.0)
        images = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    return (together - alone).abs().max().item()


def test_wrong_input_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"got \(1, 3, 32, 32\); expected: \(batch, 3, 64, 64\)"):
        build_model()(torch.zeros(1, 3, 32, 32))


# Cutting.


def test_cut_points_are_called_in_order_with_tensors_and_return_one() -> None:
    model = build_model()
    calls: list[str] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            assert all(isinstance(value, Tensor) for value in inputs)
            assert isinstance(output, Tensor)
            assert not output._is_view()  # FSDP hangs its backward hook on it
            calls.append(name)

        return hook

    for name in model.cut_points():
        model.get_submodule(name).register_forward_hook(record(name))
    model(torch.randn(1, 3, 64, 64))
    assert calls == model.cut_points()
    assert len(calls) == 1 + 3 + 4 + 9
    outside = [n for n, _ in model.named_parameters() if not n.startswith(tuple(p + "." for p in calls))]
    assert outside == ["norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"]


def test_no_module_reads_parameters_that_others_hold() -> None:
    """ZeRO-3 and FSDP gather a module's parameters for its own forward only."""
    model = build_model()
    full = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = full[parameter]

    def release(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_recomputation_keeps_gradients_and_drops_activations() -> None:
    images = torch.randn(2, 3, 64, 64)
    results = []
    for recompute in (False, True):
        model = build_model(drop_path_rate=0.3)
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(0)
        saved_bytes = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved_bytes
            saved_bytes += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(images).square().sum()
        forward_bytes = saved_bytes
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()], forward_bytes))
    (loss, grads, stored), (loss_again, grads_again, stored_again) = results
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert stored_again < stored / 10


def test_cut_points_survive_wrapping() -> None:
    model, wrapped = build_model(), build_model()
    for name in wrapped.cut_points():
        module = wrapped.get_submodule(name)
        module.forward = lambda *x, inner=module.forward: checkpoint(inner, *x, use_reentrant=False)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), wrapped(images))


# Initial weights.


def test_a_model_built_on_meta_becomes_the_one_built_in_memory() -> None:
    with torch.device("meta"):
        model = build_model()
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.init_buffers()
    model.init_weights(seed=0)
    expected = build_model()
    for (name, value), (_, other) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), expected(images))


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    model = build_model()
    weights = {name: model.initial_value(name, seed=3) for name, _ in model.named_parameters()}
    torch.manual_seed(1)
    with torch.device("meta"):
        other = build_model(depths=[2, 2, 2, 2]).bfloat16()
        for name in list(other.initial_laws)[::-1]:
            value = other.initial_value(name, seed=3)
            assert value.device.type == "cpu"
            assert value.dtype == torch.float32
            assert torch.equal(value, weights[name])
    first, second = (f"stages.0.blocks.{j}.mlp.fc1.weight" for j in (0, 1))
    assert not torch.equal(weights[first], weights[second])
    assert not torch.equal(weights[first], model.initial_value(first, seed=4))


def test_initial_values_follow_the_recipe() -> None:
    model = create_model("gc_vit_xxtiny", num_classes=10, img_size=64, layer_scale=1e-5)
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            value, name = parameter.detach(), f"{module_name}.{leaf}"
            if isinstance(module, nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                assert value.abs().max() <= bound, name
                assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.25), name
            elif isinstance(module, nn.LayerNorm):
                assert torch.all(value == (leaf == "weight")), name
            elif leaf == "gamma":
                assert torch.all(value == 1e-5), name
            elif leaf == "bias":
                assert torch.all(value == 0), name
            else:  # linear weights and bias tables
                assert value.std().item() == pytest.approx(0.02, rel=0.3), name


# Dtypes.


@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_bf16_stays_near_fp32(mode: str) -> None:
    model = build_model().eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    if mode == "pure":
        low = copy.deepcopy(model).bfloat16()
        pooled = low.forward_head(low.forward_features(images.bfloat16()), pre_logits=True)
        assert pooled.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert ((pooled - expected).norm() / expected.norm()).item() < 0.05


# timm's conventions.


def test_feature_extraction_gives_four_maps() -> None:
    features = timm.create_model("gc_vit_small", features_only=True, **SMALL | {"num_classes": 1000})
    images = torch.randn(2, 3, 64, 64)
    maps = features(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]
    assert features.feature_info.channels() == [16, 32, 64, 128]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    model = create_model("gc_vit_small", **SMALL).eval()  # the same initial weights
    features.eval()
    final = model.norm(features(images)[-1].permute(0, 2, 3, 1))
    torch.testing.assert_close(final, model.forward_features(images))


def test_feature_extraction_of_some_stages_drops_the_rest() -> None:
    features = timm.create_model("gc_vit_small", features_only=True, out_indices=(0, 1), **SMALL)
    assert [m.shape[1] for m in features(torch.randn(1, 3, 64, 64))] == [16, 32]
    assert not [name for name, _ in features.named_parameters() if "stages.2" in name or "head" in name]


def test_forward_intermediates_also_returns_the_normalised_map() -> None:
    model, images = build_model().eval(), torch.randn(1, 3, 64, 64)
    final, maps = model.forward_intermediates(images, indices=1, norm=True)
    assert torch.equal(final, model.forward_features(images))
    assert torch.equal(maps[0], final.permute(0, 3, 1, 2))


def test_classifier_can_be_reset_and_removed() -> None:
    model, images = build_model().eval(), torch.randn(2, 3, 64, 64)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size) == (2, 128)
    model.reset_classifier(3)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model(images).shape == (2, 3)
    assert torch.equal(model.head.fc.weight, model.initial_value("head.fc.weight", seed=0))
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    assert "head.fc.weight" not in model.initial_laws
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 2, 2, 128)


def test_no_weight_decay_names_the_bias_tables() -> None:
    model = build_model()
    names = model.no_weight_decay()
    assert len(names) == 9
    assert names < {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_follow_the_forward_order(coarse: bool) -> None:
    model = build_model()
    groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    order = ["stem", *(n for n in model.cut_points() if n != "stem"), *([] if coarse else ["norm"]), "head"]
    ids = [next(i for n, i in groups.items() if n.startswith(prefix + ".")) for prefix in order]
    assert ids == sorted(ids)
    assert len(set(ids)) == (6 if coarse else 11)
