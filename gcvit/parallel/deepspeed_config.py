"""Build DeepSpeed's configuration, with `zero.extra` merged in.

The top-level keys of DeepSpeed 0.19.8 are of three kinds. The trainer decides some: `zero.extra` may repeat their value
and not change it. Some tune or observe: they are passed on. All others belong to features that are not used here, and
are refused. DeepSpeed ignores unknown top-level keys without a message, so they are refused here. It refuses unknown
keys below the top itself.
"""

import difflib
from typing import Any

import torch
from torch import nn

from gcvit.config.schema import OptimConfig, ZeroConfig
from gcvit.errors import UserError

Settings = dict[str, Any]

_PRECISION = "set precision"
_CHECKPOINTS = "remove it: checkpoints are the trainer's own, see trainer.save_every"
_BATCH = "set global_batch_size and trainer.micro_batch_size"
_OFFLOADING = "set zero.offload_optimizer or zero.offload_parameters"
# Keys that are decided here, by path, and what the user sets instead.
_DECIDED = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "gradient_clipping": "set optim.clip_norm",
    "optimizer": "set optim.*: the optimizer is AdamW",
    "zero_force_ds_cpu_optimizer": "set optim.*: the optimizer is AdamW",
    "scheduler": "set schedule.* and optim.lr",
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": "remove it: gradients are summed in fp32 over micro-steps",
    "communication_data_type": "remove it: gradients are summed in fp32 over ranks",
    "gradient_allreduce_op": "remove it: the update is that of the mean over the global batch",
    "prescale_gradients": "remove it: sums in fp32 do not overflow",
    "gradient_predivide_factor": "remove it: sums in fp32 do not overflow",
    "disable_allgather": "remove it: every rank computes with the updated weights",
    "activation_checkpointing": "set activation_checkpointing of this trainer",
    "compile": "set compile of this trainer",
    "checkpoint": _CHECKPOINTS,
    "steps_per_print": "set trainer.log_every",
    "zero_optimization.stage": "set zero.stage",
    "zero_optimization.contiguous_gradients": "remove it: gradients are contiguous",
    "zero_optimization.offload_optimizer.device": _OFFLOADING,
    "zero_optimization.offload_param.device": _OFFLOADING,
    "zero_optimization.cpu_offload": _OFFLOADING,
    "zero_optimization.cpu_offload_param": _OFFLOADING,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOADING,
    "zero_optimization.compute_grad_norm": "remove it: clipping, refusing and the log need the norm",
    "zero_optimization.memory_efficient_linear": "remove it: it would replace torch's linear for the whole process",
    "zero_optimization.offload_optimizer.ratio": "remove it: the optimizer is on the host as a whole",
    "zero_optimization.offload_optimizer.super_offload": "remove it: the optimizer is torch's AdamW",
    "zero_optimization.allgather_bucket_size": "remove it: updated weights are gathered in one message",
    # Both gather whole submodules, and the stem would get no gradient.
    "zero_optimization.stage3_module_granularity_threshold": "remove it: the model is gathered part by part",
    "zero_optimization.leaf_module": "remove it: the model is gathered part by part",
    # Measured: it stores weights where the engine does not expect them.
    "zero_optimization.round_robin_gradients": "remove it: weights would lie in another order",
    # DeepSpeed creates its groups once in a process, and each part of the model would create them.
    "zero_optimization.zero_hpz_partition_size": "use engine=fsdp with fsdp.shard_size",
    "zero_optimization.zero_quantized_nontrainable_weights": "remove it: all weights are trained",
    "zero_optimization.zenflow": "remove it: it updates later than the step that the loop counts",
    "zero_optimization.legacy_stage1": "remove it: DeepSpeed 0.19.8 has it no more",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.gather_16bit_weights_on_model_save": _CHECKPOINTS,
}
# Keys that tune or observe, and change no result.
_PASSED_ON = {
    "zero_optimization",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "timers",
    "disable_python_gc",
    "zero_allow_untested_optimizer",
}


def build_settings(
    optim: OptimConfig, zero: ZeroConfig, module: nn.Module, num_micro_steps: int, dtype: torch.dtype
) -> Settings:
    """Build DeepSpeed's configuration for this model, with `zero.extra` merged in.

    Raises:
        UserError: for a key of `zero.extra` that is unknown or contradicts the trainer.
    """
    sizes = _sizes(zero.stage, sum(p.numel() for p in module.parameters()))
    decided: Settings = {
        "train_micro_batch_size_per_gpu": 1,  # nominal: samples are counted by the stream
        "gradient_accumulation_steps": num_micro_steps,
        "gradient_clipping": optim.clip_norm or 0.0,  # always written: DeepSpeed's default is 1.0
        "bf16": {"enabled": dtype == torch.bfloat16},
        # The scale is the trainer's own; any but 0, which would be DeepSpeed's.
        "fp16": {"enabled": dtype == torch.float16, "loss_scale": 1.0},
        # By default gradients are summed in the compute precision, over micro-steps and over ranks.
        "communication_data_type": "fp32",
        # A sum spares a pass over all gradients: the loss is divided instead. Stage 3 knows the mean alone.
        "gradient_allreduce_op": "mean" if zero.stage == 3 else "sum",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero.stage,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            "memory_efficient_linear": False,
            **_offloading(zero),
            **sizes,
        },
        "steps_per_print": 2**31,
    }
    return _merge(decided, zero.extra or {})


def _sizes(stage: int, num_parameters: int) -> Settings:
    """Compute the sizes of buffers and messages, in elements, from the model's; `zero.extra` may set others.

    DeepSpeed's defaults are for models a hundred times as large. It would reduce a GC ViT in a single message after
    backward, and hold one such bucket, or two with overlap, for the whole run.
    """
    # With an eighth, seven messages are sent while backward runs. Smaller ones would cost more than they hide.
    sizes: Settings = {"reduce_bucket_size": max(num_parameters // 8, 1_000_000)}
    if stage < 3:
        # DeepSpeed reduces its buckets over all ranks either way. With True it would copy them out piece by piece.
        return sizes | {"reduce_scatter": False}
    return sizes | {
        # A gathered parameter is freed after its use: by default none is that will be used again within 1e9 elements.
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": max(num_parameters // 4, 1_000_000),
        "stage3_prefetch_bucket_size": num_parameters // 20,
        # Small ones travel in the message of their part; kept whole, each would be gathered by itself after updates.
        "stage3_param_persistence_threshold": 0,
    }


def _offloading(zero: ZeroConfig) -> Settings:
    pinned = torch.cuda.is_available()
    places = {"offload_optimizer": zero.offload_optimizer, "offload_param": zero.offload_parameters}
    return {key: {"device": place, "pin_memory": pinned} for key, place in places.items() if place is not None}


def _merge(ours: Settings, extra: Settings, path: str = "", hint: str | None = None) -> Settings:
    merged = dict(ours)
    for key, value in extra.items():
        place = f"{path}{key}"
        hint_here = hint or _DECIDED.get(place)
        if not path and hint_here is None and key not in _PASSED_ON:
            _refuse_unknown(key)
        if isinstance(ours.get(key, {}), dict) and isinstance(value, dict):
            merged[key] = _merge(ours.get(key, {}), value, f"{place}.", hint_here)
        elif hint_here is not None or isinstance(ours.get(key), dict):
            if key not in ours or value != ours[key]:
                raise UserError(
                    f"zero.extra.{place} is decided by the trainer",
                    got=value,
                    expected=ours.get(key, "nothing"),
                    hint=hint_here or "give a mapping",
                )
        elif value != "auto" or key not in ours:  # DeepSpeed would put its own default there
            merged[key] = value
    return merged


def _refuse_unknown(key: str) -> None:
    near = difflib.get_close_matches(key, _PASSED_ON, n=1)
    raise UserError(
        "zero.extra has a key that DeepSpeed 0.19.8 does not know, or that is for what this trainer does not use",
        got=key,
        expected=", ".join(sorted(_PASSED_ON)),
        hint=f"write {near[0]}" if near else "remove it",
    )
