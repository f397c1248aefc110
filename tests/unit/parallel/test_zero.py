"""What `zero.extra` may say, sizes in proportion to the model, and what engine zero refuses."""

import pytest
import torch
from torch import nn

from gcvit.config.schema import OptimConfig, ZeroConfig
from gcvit.errors import UserError
from gcvit.parallel.build import build_engine
from gcvit.parallel.deepspeed_config import build_settings
from tests.helpers.engines import configure

SMALL = nn.Linear(1000, 1000, device="meta")


def settings(extra: dict | None = None, *, dtype: torch.dtype = torch.float32, module: nn.Module = SMALL, **zero):
    return build_settings(OptimConfig(lr=1e-3), ZeroConfig(extra=extra, **zero), module, 2, dtype)


def test_further_keys_are_merged_with_ours():
    plain = settings()
    merged = settings({"comms_logger": {"enabled": True}, "zero_optimization": {"ignore_unused_parameters": False}})
    assert merged.pop("comms_logger") == {"enabled": True}
    assert merged["zero_optimization"].pop("ignore_unused_parameters") is False
    assert merged == plain


def test_sizes_may_be_set_and_what_is_decided_may_be_said_again():
    extra = {"gradient_clipping": 5.0, "zero_optimization": {"stage": 2, "reduce_bucket_size": 77}}
    assert settings(extra)["zero_optimization"]["reduce_bucket_size"] == 77


@pytest.mark.parametrize(
    ("extra", "hint"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero.stage"),
        ({"gradient_clipping": 1.0}, "optim.clip_norm"),
        ({"train_batch_size": 64}, "global_batch_size"),
        ({"gradient_accumulation_steps": 7}, "trainer.micro_batch_size"),
        ({"optimizer": {"type": "Lamb"}}, "optim."),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule."),
        ({"fp16": {"enabled": True}}, "precision"),
        ({"bf16": {"check_grad_overflow": False}}, "precision"),
        ({"checkpoint": {"load_universal": True}}, "trainer.save_every"),
        ({"activation_checkpointing": {"partition_activations": True}}, "activation_checkpointing"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero.offload_optimizer"),
        ({"zero_optimization": {"cpu_offload": True}}, "zero.offload_optimizer"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "clipping"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "fsdp.shard_size"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "remove"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "on the host as a whole"),
        ({"zero_optimization": {"leaf_module": {"names": ["stem"]}}}, "part by part"),
        ({"zero_optimization": {"stage3_module_granularity_threshold": 1000}}, "part by part"),
        ({"zero_optimization": {"allgather_bucket_size": 1001}}, "one message"),
        ({"gradient_predivide_factor": 2.0}, "remove"),
        ({"zero_optimization": True}, "mapping"),
        ({"comms_loger": {}}, "write comms_logger"),
        ({"nebula": {}}, "remove"),
    ],
)
def test_a_key_that_contradicts_ours_is_refused_with_its_hint(extra, hint):
    with pytest.raises(UserError) as error:
        settings(extra)
    assert hint in str(error.value).split("hint: ")[1]
    assert "got" in str(error.value)


@pytest.mark.parametrize(
    "extra",
    [
        "{zero_optimization: {reduce_bucket_siz: 3}}",
        "{zero_optimization: {mics_shard_size: 3}}",
        "{zero_optimization: {reduce_bucket_size: many}}",
        "{comms_logger: {enable: true}}",
        "{comms_logger: 3}",
        "{zero_optimization: {zero_quantized_weights: true}}",  # here, without a GPU
    ],
)
def test_what_deepspeed_refuses_is_the_users_to_mend(extra, world):
    config = configure("zero2", f"zero.extra={extra}")
    with pytest.raises(UserError, match=r"zero\.extra"):
        build_engine(config, world, num_micro_steps=1)


def test_what_deepspeed_would_choose_is_chosen_here():
    """Its "auto" means its own default, which is for models a hundred times as large."""
    plain = settings({})
    assert settings({"zero_optimization": {"reduce_bucket_size": "auto"}}) == plain


def test_buckets_follow_the_model():
    small, large = (settings(module=nn.Linear(n, 1000, device="meta"), stage=3) for n in (10_000, 100_000))
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters"):
        sizes = [one["zero_optimization"][key] for one in (small, large)]
        assert sizes[1] == pytest.approx(10 * sizes[0], rel=0.01)
        assert sizes[1] <= 100_001_000 / 4


def test_gradients_are_summed_in_fp32():
    for stage, dtype in ((1, torch.bfloat16), (1, torch.float16), (2, torch.bfloat16), (3, torch.float16)):
        chosen = settings(stage=stage, dtype=dtype)
        assert chosen["data_types"] == {"grad_accum_dtype": "fp32"}
        assert (chosen["fp16"]["enabled"], chosen["bf16"]["enabled"]) == (
            dtype == torch.float16,
            dtype == torch.bfloat16,
        )
