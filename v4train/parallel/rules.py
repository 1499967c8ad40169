"""What a layout asks of a model: each thing that ranks share out must divide among them."""

from collections.abc import Iterator

from v4train.errors import ConfigError
from v4train.model import ModelConfig
from v4train.parallel.sizes import Sizes


def check_layout_of(
    model: ModelConfig, sizes: Sizes, sequence_length: int, length_key: str = "train.sequence_length"
) -> None:
    """Raise ConfigError for a model, or rows, that `sizes` ranks can't share out evenly. length_key: the rows'."""
    for axis, key, value in _shared_out(model, sequence_length, length_key):
        count = getattr(sizes, axis)
        if value % count:
            rule = f"{key}={value} must be a multiple of it: it is shared out evenly"
            fitting = max(size for size in range(1, count) if value % size == 0)
            raise ConfigError(f"parallelism.{axis}", count, rule, f"for example parallelism.{axis}={fitting}")
    if sizes.expert > 1 and "moe" not in model.ffn_kinds:
        rule = f"no layer of model.ffn_mix={model.ffn_mix} has experts"
        raise ConfigError("parallelism.expert", sizes.expert, rule, "set parallelism.expert=1")
    parts = model.num_layers + 2
    if sizes.pipeline > parts:
        rule = f"the model has {parts} parts to share out: embedding, {model.num_layers} layers, head with MTP"
        raise ConfigError("parallelism.pipeline", sizes.pipeline, rule, f"at most parallelism.pipeline={parts}")
    for layer in [*model.layers, *[model.mtp_layer] * model.mtp.num_layers]:
        heads = layer.num_kv_heads if layer.kind in ("mha", "mqa", "gqa") else 1
        if heads % sizes.tensor and sizes.tensor % heads:
            rule = f"the {heads} KV heads of a {layer.kind} layer must be a multiple of it, or divide it"
            raise ConfigError("parallelism.tensor", sizes.tensor, rule, "for example parallelism.tensor=1")


def _shared_out(model: ModelConfig, sequence_length: int, length_key: str) -> Iterator[tuple[str, str, int]]:
    """(axis, key, number) of all that is."""
    attention, moe = model.attention, model.moe
    kinds = set(model.layer_kinds) | ({model.mtp_layer.kind} if model.mtp.num_layers else set())
    ffns = set(model.ffn_kinds)
    yield "context", length_key, sequence_length
    yield "tensor", "model.vocab_size", model.vocab_size
    if kinds & {"swa", "csa", "hca"}:
        yield "tensor", "model.attention.num_heads", attention.num_heads
        yield "tensor", "model.attention.o_groups", attention.o_groups
    if "csa" in kinds:
        yield "tensor", "model.attention.indexer.num_heads", attention.indexer.num_heads
    if kinds & {"mha", "mqa", "gqa"}:
        yield "tensor", "model.attention.gqa.num_heads", attention.gqa.num_heads
    if kinds & {"mla", "dsa"}:
        yield "tensor", "model.attention.mla.num_heads", attention.mla.num_heads
    if "dsa" in kinds:
        yield "tensor", "model.attention.dsa.num_heads", attention.dsa.num_heads
    if "dense" in ffns:
        yield "tensor", "model.ffn.intermediate_size", model.ffn.intermediate_size
    if "moe" in ffns:
        yield "expert", "model.moe.num_experts", moe.num_experts
        yield "tensor", "model.moe.intermediate_size", moe.intermediate_size
        if moe.expert_bias:
            yield "tensor", "model.hidden_size", model.hidden_size
