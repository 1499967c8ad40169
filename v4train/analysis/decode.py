"""What one decoded token costs a whole model: FLOPs by kind of product, and in equivalents of FP8 ones (V4.md 4.2).

Counted as the V4 report seems to: every matrix that a token is multiplied with but the input embedding and MTP, the
attention over what is seen (mla and dsa in absorbed form), and the lightning indexer's scores. Published are ratios and
not the accounting; these assumptions reproduce them, others tried do not.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields

from v4train.analysis.flops import decode_flops
from v4train.analysis.parameters import Parameter, parameters
from v4train.errors import ConfigError
from v4train.model.config import ModelConfig


@dataclass
class Precisions:
    """In which precision each kind of product is made: values and their meaning in conf/estimate.yaml."""

    projections: str
    compressors: str
    attention: str
    index_csa: str
    index_dsa: str
    ffn: str
    routers: str
    residual: str
    head: str


@dataclass
class Rates:
    """Time of a FLOP in each precision, in those of FP8: conf/estimate.yaml."""

    fp4: float
    fp8: float
    bf16: float
    fp32: float


PRODUCTS = tuple(field.name for field in fields(Precisions))


def decode_matrices(config: ModelConfig, indexers_apart: bool = False) -> dict[str, int]:
    """Matrix elements that a decoded token is multiplied with, by kind of product."""
    total: Counter[str] = Counter()
    for parameter, kind, size in used_matrices(config):
        total["indexers" if indexers_apart and parameter.part == "indexers" else kind] += size
    if config.tie_embedding:
        total["head"] += config.vocab_size * config.hidden_size
    return dict(total)


def used_matrices(config: ModelConfig) -> Iterator[tuple[Parameter, str, int]]:
    """Each matrix, its kind of product, and how many of its elements a token meets."""
    for parameter in parameters(config):
        if (kind := _kind(parameter)) is not None:
            yield parameter, kind, _used(config, parameter)


def decode_by_product(config: ModelConfig, context: int) -> dict[str, int]:
    """FLOPs of the last of `context` >= 1 tokens of a row, decoded with a cache, by kind of product."""
    total = Counter({kind: 2 * size for kind, size in decode_matrices(config).items()})
    for layer in config.layers:
        step = decode_flops(config, layer, context)
        total["attention"] += step["attention"]
        if step["index"]:
            total[f"index_{layer.kind}"] += step["index"]
    return {kind: total[kind] for kind in PRODUCTS if total[kind]}


def fp8_equivalents(flops: dict[str, int], precisions: Precisions, rates: Rates) -> dict[str, float]:
    """The same FLOPs, each weighted with the time that it takes beside an FP8 one."""
    return {kind: count * getattr(rates, getattr(precisions, kind)) for kind, count in flops.items()}


def check_precisions(precisions: Precisions, prefix: str) -> None:
    """Raise ConfigError for a precision that has no rate."""
    known = [field.name for field in fields(Rates)]
    for kind in PRODUCTS:
        if (value := getattr(precisions, kind)) not in known:
            raise ConfigError(f"{prefix}.{kind}", value, "unknown precision", f"use one of {', '.join(known)}")


def _kind(parameter: Parameter) -> str | None:
    """Which of PRODUCTS it is a factor of; None for what is no matrix of a decoded token."""
    name, part = parameter.name, parameter.part
    if len(parameter.shape) < 2 or name.endswith("bias") or part in ("mtp", "embedding"):
        return None
    if part == "indexers":  # as released, what makes keys and head weights stays in bf16 or fp32, queries do not
        return "compressors" if ".compressor." in name or "head_weight" in name else "projections"
    return {"attention": "projections", "dense": "ffn", "experts": "ffn", "shared": "ffn"}.get(part, part)


def _used(config: ModelConfig, parameter: Parameter) -> int:
    """Elements that one token is multiplied with."""
    if parameter.is_expert:
        return parameter.size // config.moe.num_experts * config.moe.top_k
    if parameter.part == "residual" and config.residual.kind == "hc":
        return parameter.size * config.num_streams  # once a stream
    return parameter.size
