"""DeepSpeed's JSON: what we write, and which of its keys a user may add through `parallelism.deepspeed`."""

from collections.abc import Mapping
from typing import Any

from v4train.errors import ConfigError

# Keys a user may not set, and what to do instead. A nested key is written with a dot.
REFUSED = {
    "train_batch_size": "set train.global_batch_size",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size",
    "gradient_accumulation_steps": "set train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "leave it out, the engine counts micro-batches",
    "gradient_clipping": "set train.grad_clip",
    "optimizer": "set optimizer=muon or optimizer=adamw",
    "scheduler": "set schedule.*",
    "fp16": "set precision=bf16",
    "bf16": "set precision=bf16",
    "amp": "set precision=bf16",
    "torch_autocast": "set precision=bf16",
    "data_types": "leave it out, gradients are summed in float32",
    "communication_data_type": "leave it out, gradients are reduced in float32",
    "gradient_allreduce_op": "leave it out, the maths is a mean",
    "zero_allow_untested_optimizer": "leave it out, it is always on",
    "steps_per_print": "set train.log_every",
    "tensor_parallel": "set parallelism.tensor",
    "expert_parallel": "set parallelism.expert",
    "pipeline": "set parallelism.pipeline",
    "sequence_parallel_size": "set parallelism.context",
    "zero_optimization.stage": "set parallelism.zero_stage",
    # Each of these moves gradients or optimizer state to where clipping and checkpoints do not look (0.19.8).
    "zero_optimization.offload_optimizer": "leave it out, offload is not available",
    "zero_optimization.offload_param": "leave it out, offload is not available",
    "zero_optimization.cpu_offload": "leave it out, offload is not available",
    "zero_optimization.cpu_offload_param": "leave it out, offload is not available",
    "zero_optimization.zenflow": "leave it out, ZenFlow is not available",
    "zero_optimization.compute_grad_norm": "leave it out, it is what stops a step that is not finite",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "leave it out, it only serves offload",
    "zero_optimization.parameter_alignment": "leave it out, stacked matrices would be orthogonalised as one",
    "zero_optimization.reduce_scatter": "leave it out, Muon in ZeRO 3 needs it off",
    "zero_optimization.zero_hpz_partition_size": "leave it out, checkpoints need one partition per rank",
    "zero_optimization.zero_quantized_gradients": "leave it out, gradients are reduced in float32",
}


def check_deepspeed_keys(extra: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key of `parallelism.deepspeed` that one of our own settings decides."""
    nested = extra.get("zero_optimization") or {}
    if not isinstance(nested, Mapping):
        key = "parallelism.deepspeed.zero_optimization"
        raise ConfigError(key, nested, "a group of keys is expected", "set single keys of it")
    for key, remedy in REFUSED.items():
        parent, _, child = key.rpartition(".")
        holder = nested if parent else extra
        if child in holder:
            raise ConfigError(f"parallelism.deepspeed.{key}", holder[child], "decided elsewhere in v4train", remedy)


def check_zero_options(extra: Mapping[str, Any], zero_stage: int) -> None:
    """Raise ConfigError for what DeepSpeed, which is imported, refuses of `parallelism.deepspeed.zero_optimization`."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**(extra.get("zero_optimization") or {}), stage=zero_stage)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["parallelism.deepspeed.zero_optimization", *map(str, first["loc"])])
        raise ConfigError(key, first["input"], f"DeepSpeed: {first['msg']}", "see its zero_optimization") from error
    except AssertionError as error:  # of keys that DeepSpeed has given other names
        key, options = "parallelism.deepspeed.zero_optimization", extra["zero_optimization"]
        raise ConfigError(key, options, f"DeepSpeed: {error}", "see its zero_optimization") from error


def deepspeed_config(
    extra: Mapping[str, Any],
    *,
    zero_stage: int,
    data_size: int,
    micro_batch_size: int,
    accumulation_steps: int,
    precision: str,
    use_muon: bool,
    bucket: int | None = None,
) -> dict[str, Any]:
    """The JSON given to `deepspeed.initialize`. `precision` is fp32 or bf16; `extra` passes `check_deepspeed_keys`.

    bucket: numbers that ZeRO 1-2 reduce at a time where `extra` doesn't say; None for DeepSpeed's default.
    """
    if precision not in ("fp32", "bf16"):
        raise ConfigError("precision", precision, "unknown precision", "use fp32 or bf16")
    check_deepspeed_keys(extra)
    zero = dict(extra.get("zero_optimization") or {}, stage=zero_stage)
    if bucket is not None and zero_stage in (1, 2):
        zero.setdefault("reduce_bucket_size", bucket)
    if zero_stage == 3 and use_muon:
        zero["reduce_scatter"] = False  # deepspeed 0.19.8 refuses Muon with it
    config = dict(
        extra,
        train_batch_size=micro_batch_size * accumulation_steps * data_size,
        train_micro_batch_size_per_gpu=micro_batch_size,
        gradient_accumulation_steps=accumulation_steps,
        gradient_clipping=0.0,  # deepspeed 0.19.8 defaults to 1.0 and, in ZeRO 1-3, would clip Muon's updates
        zero_optimization=zero,
        zero_allow_untested_optimizer=True,
        steps_per_print=2**62,
    )
    if precision == "bf16":
        # float32 parameters under autocast. A module listed as safe would have its gradients reduced in bfloat16
        # (ZeRO 1-3, torch_autocast.py); the empty list keeps every reduction in float32.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
