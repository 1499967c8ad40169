"""Parameters, FLOPs, caches, memory and traffic of a model and a layout, from the configuration alone.

    python tools/estimate.py model=pro parallelism=pro train.global_batch_size=1024 train.sequence_length=4096
    python tools/estimate.py estimate.compare=[v32,flash,pro] estimate.context=1048576
    python tools/estimate.py estimate.compare=[v32,flash,pro] estimate.plot=curves.png estimate.format=json

`estimate.*` are the keys of conf/estimate.yaml, all else overrides of conf/, as in launch/pretrain.py; the layout is
for `estimate.ranks` ranks. `estimate.compare` sets several models side by side, with ratios to the first one. Nothing
is allocated, PyTorch not even imported. The assumptions stand below what is printed, and in docs/efficiency.md.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from v4train.analysis.decode import (
    Precisions,
    Rates,
    check_precisions,
    decode_by_product,
    decode_matrices,
    fp8_equivalents,
)
from v4train.analysis.flops import MODE_PASSES, part_flops, training_flops_per_token
from v4train.analysis.kv_cache import (
    cache_bytes,
    cache_bytes_per_token,
    deployed_bytes_per_token,
    deployed_cache_bytes,
)
from v4train.analysis.memory import GIB, peak_memory
from v4train.analysis.parameters import counts_by_part, parameter_counts
from v4train.analysis.step_time import bubble_fraction, traffic_per_rank
from v4train.analysis.work import Work
from v4train.errors import ConfigError, refusing_bad_input
from v4train.estimation import read_works
from v4train.model.config import ModelConfig, model_config
from v4train.overrides import complete, composed
from v4train.structured import structured, wants_help

FORMATS = ("table", "json")
PLOTS = (".png", ".svg", ".pdf")
WIDTH = 140  # of tables that no terminal shows
CURVE = [2**power for power in range(12, 21)]  # contexts of plot and JSON: 4K to 1M


@dataclass
class EstimateConfig:
    """Values and their meaning: conf/estimate.yaml."""

    context: int
    compare: Any
    format: str
    plot: str | None
    ranks: int | None
    precisions: Precisions
    rates: Rates

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError("estimate.context", self.context, "it must be at least 1", "e.g. 1048576")
        if self.format not in FORMATS:
            raise ConfigError("estimate.format", self.format, "unknown format", f"use one of {', '.join(FORMATS)}")
        if self.ranks is not None and self.ranks < 1:
            raise ConfigError("estimate.ranks", self.ranks, "it must be at least 1", "or null for as few as needed")
        if not (self.compare is None or isinstance(self.compare, list) and self.compare):
            raise ConfigError("estimate.compare", self.compare, "a list of models is expected", "e.g. [v32,flash,pro]")
        names = [str(name) for name in self.compare or []]
        if len(set(names)) < len(names) or any("/" in name for name in names):
            rule = "each is an option of the group model, and stands there once"
            raise ConfigError("estimate.compare", self.compare, rule, "e.g. [v32,flash,pro]")
        check_precisions(self.precisions, "estimate.precisions")
        for name, rate in asdict(self.rates).items():
            if not 0 < rate < math.inf:
                raise ConfigError(f"estimate.rates.{name}", rate, "it must be above 0", "see conf/estimate.yaml")
        if self.plot is not None and Path(self.plot).suffix not in PLOTS:
            raise ConfigError("estimate.plot", self.plot, "unknown kind of file", f"use one of {', '.join(PLOTS)}")
        if self.compare is not None and self.ranks is not None:
            rule = "estimate.compare looks at models, not at a layout"
            raise ConfigError("estimate.ranks", self.ranks, rule, "leave it out, or estimate.compare")


def main(arguments: list[str]) -> None:
    if wants_help(arguments):
        return print(__doc__)
    own = [word for word in arguments if word.lstrip("+~").startswith("estimate.")]
    overrides = [word for word in arguments if word not in own]
    options = structured(EstimateConfig, composed("estimate", own).estimate, "estimate")
    if options.plot is not None:
        check_plot(Path(options.plot))
    if options.compare is None:
        config = composed("pretrain", overrides)
        complete(config, overrides)
        model = model_config(config.model)
        models = {str(model.name): model}
        works = read_works(config, model, options.ranks)
        work = max(works, key=lambda of: peak_memory(model, of).total)
        result = {**decoding(model, options), **training(model, work)}
        text = json.dumps(result, indent=1) if options.format == "json" else shown(str(model.name), result, options)
    else:
        for word in overrides:
            key, _, value = word.partition("=")
            if key == "model":
                raise ConfigError("model", value, "estimate.compare names the models", "leave it out")
            if not key.lstrip("+~").startswith(("model.", "model/")):
                rule = "estimate.compare looks at models, not at a run or its layout"
                raise ConfigError(key, value, rule, "leave it out, or estimate.compare")
        models = {
            str(name): model_config(composed("pretrain", [f"model={name}", *overrides]).model)
            for name in options.compare
        }
        result = compared(models, options)
        text = json.dumps({"models": result}, indent=1) if options.format == "json" else shown_beside(result, options)
    print(text)
    if options.plot:
        plot(models, options, Path(options.plot))


def decoding(model: ModelConfig, options: EstimateConfig) -> dict[str, Any]:
    """Of one model: sizes, and what one decoded token costs at `estimate.context`."""
    total, active = parameter_counts(model)
    parts = counts_by_part(model)
    flops = decode_by_product(model, options.context)
    weighted = fp8_equivalents(flops, options.precisions, options.rates)
    return {
        "parameters": {
            "total": total,
            "active": active,
            "total_with_mtp": sum(parts.values()),
            "by_part": parts,
        },
        "context": options.context,
        "decode_flops": sum(flops.values()),
        "decode_flops_by_product": flops,
        "decode_fp8_flops": sum(weighted.values()),
        "decode_fp8_flops_by_product": weighted,
        "kv_bytes": {
            "deployed": deployed_cache_bytes(model, options.context),
            "bf16": cache_bytes(model, 1, options.context, 2),
            "fp32": cache_bytes(model, 1, options.context, 4),
        },
        "kv_bytes_per_token": {
            "deployed": deployed_bytes_per_token(model),
            "bf16": sum(cache_bytes_per_token(model, layer, 2) for layer in model.layers),
            "fp32": sum(cache_bytes_per_token(model, layer, 4) for layer in model.layers),
        },
        "curve": curve(model, options),
    }


def training(model: ModelConfig, work: Work) -> dict[str, Any]:
    """Of one model on one layout: FLOPs, memory of the fullest rank, traffic of a rank, bubble."""
    memory = peak_memory(model, work)
    return {
        "layout": asdict(work) | {"ranks": work.world, "tokens_per_step": work.step_tokens},
        "training_flops_per_token": training_flops_per_token(model, work.sequence_length, work.mode),
        "training_flops_by_part": training_parts(model, work.sequence_length, work.mode),
        "memory_gib": {name: size / GIB for name, size in memory.parts.items()} | {"total": memory.total / GIB},
        "memory_phase": memory.phase,
        "traffic_gib": {axis: sent / GIB for axis, sent in traffic_per_rank(model, work).items()},
        "bubble": bubble_fraction(work),
    }


def training_parts(model: ModelConfig, sequence_length: int, mode: str) -> dict[str, float]:
    """Training FLOPs per token: of every kind of product, of the indexers' matrices, of attention over what is seen and
    indexers' scores, and of MTP as a whole."""
    of_trunk, of_indexers = MODE_PASSES[mode]
    sizes = decode_matrices(model, indexers_apart=True)
    parts = {kind: 2.0 * (of_indexers if kind == "indexers" else of_trunk) * size for kind, size in sizes.items()}
    of_mtp = sum(part_flops(model, sequence_length, mode)[model.num_layers + 2 :])
    whole = training_flops_per_token(model, sequence_length, mode)
    parts["attention"] = whole - of_mtp - sum(parts.values())
    return parts | ({"mtp": of_mtp} if of_mtp else {})


def compared(models: dict[str, ModelConfig], options: EstimateConfig) -> dict[str, dict[str, Any]]:
    """`decoding` of each, and its ratios to the first."""
    result = {name: decoding(model, options) for name, model in models.items()}
    first = next(iter(result.values()))
    for of in result.values():
        of["flops_ratio"] = of["decode_fp8_flops"] / first["decode_fp8_flops"]
        of["kv_ratio"] = of["kv_bytes"]["deployed"] / first["kv_bytes"]["deployed"]
        growth = first["kv_bytes_per_token"]["deployed"]
        of["kv_per_token_ratio"] = of["kv_bytes_per_token"]["deployed"] / growth if growth else None
    return result


def shown_beside(result: dict[str, dict[str, Any]], options: EstimateConfig) -> str:
    first = next(iter(result))
    table = Table(title=f"One token decoded at a context of {options.context:,}")
    share = f"of {first}'s"
    table.add_column("model")
    for column in ("parameters", "active", "GFLOPs (FP8)", share, "KV cache GiB", share, "KV bytes/token"):
        table.add_column(column, justify="right")
    for name, of in result.items():
        counts = of["parameters"]
        table.add_row(
            name,
            short(counts["total"]),
            short(counts["active"]),
            figure(of["decode_fp8_flops"] / 1e9),
            f"{of['flops_ratio']:.2%}",
            figure(of["kv_bytes"]["deployed"] / GIB),
            f"{of['kv_ratio']:.2%}",
            f"{of['kv_bytes_per_token']['deployed']:,.1f}",
        )
    parts = Table(title="GFLOPs (FP8) by kind of product")
    parts.add_column("model")
    kinds = list(dict.fromkeys(kind for of in result.values() for kind in of["decode_fp8_flops_by_product"]))
    for kind in kinds:
        parts.add_column(kind, justify="right")
    for name, of in result.items():
        row = of["decode_fp8_flops_by_product"]
        parts.add_row(name, *(figure(row[kind] / 1e9) if kind in row else "-" for kind in kinds))
    return "\n".join([rendered(table), rendered(parts), assumptions(options)])


def shown(name: str, result: dict[str, Any], options: EstimateConfig) -> str:
    """Tables of one model on its layout."""
    counts, memory, layout = result["parameters"], result["memory_gib"], result["layout"]
    kv = result["kv_bytes"]
    facts = Table(title=name, show_header=False)
    facts.add_column("what")
    facts.add_column("value")
    sizes = ", ".join(f"{axis} {layout[axis]}" for axis in ("pipeline", "data", "context", "tensor", "expert"))
    by_part = ", ".join(f"{part} {short(size)}" for part, size in counts["by_part"].items())
    rows = [
        ("parameters, without MTP", f"{short(counts['total'])}, {short(counts['active'])} active for a token"),
        ("by part", by_part),
        ("training FLOPs per token", joined(result["training_flops_by_part"], result["training_flops_per_token"])),
        (
            f"decoding at {options.context:,}",
            joined(result["decode_fp8_flops_by_product"], result["decode_fp8_flops"], " in FP8's"),
        ),
        (
            "KV cache of a row",
            f"{kv['deployed'] / GIB:,.3f} GiB as deployed, {kv['bf16'] / GIB:,.3f} in bf16, {kv['fp32'] / GIB:,.3f} in "
            f"fp32; {result['kv_bytes_per_token']['deployed']:,.1f} bytes a token as deployed",
        ),
        ("layout", f"{layout['ranks']} ranks: {sizes}, ZeRO {layout['zero_stage']}"),
        (
            "step",
            f"{layout['tokens_per_step']:,} tokens: {layout['accumulation']} micro-batches of {layout['rows']} x "
            f"{layout['sequence_length']:,} on each of {layout['data']} data ranks, {layout['optimizer']}, "
            f"{layout['precision']}, recompute {layout['recompute']}, attention {layout['mode']}",
        ),
        (f"GiB of the fullest rank, in {result['memory_phase']}", joined(memory, memory["total"], per=1)),
        ("GiB that a rank sends a step", joined(result["traffic_gib"], sum(result["traffic_gib"].values()), per=1)),
        ("pipeline bubble", f"{result['bubble']:.1%}"),
    ]
    for row in rows:
        facts.add_row(*row)
    return "\n".join([rendered(facts), assumptions(options)])


def joined(parts: dict[str, float], whole: float, unit: str = "", per: float = 1e9) -> str:
    """`12.3 G in all: a 10, b 2.3`."""
    listed = ", ".join(f"{name} {figure(value / per)}" for name, value in parts.items() if value and name != "total")
    return f"{figure(whole / per)}{' G' if per == 1e9 else ''}{unit}" + (f": {listed}" if listed else "")


def figure(value: float) -> str:
    """Two decimals of what is large enough for them, else three digits."""
    return f"{value:,.2f}" if value >= 1 or value == 0 else f"{value:.3g}"


def short(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:,.3f} {unit}" if unit == "T" else f"{count / size:,.2f} {unit}"
    return f"{count:,.0f}"


def assumptions(options: EstimateConfig) -> str:
    """What the figures rest on, in words."""
    rates = asdict(options.rates)
    by_precision: dict[str, list[str]] = {}
    for kind, precision in asdict(options.precisions).items():
        by_precision.setdefault(precision, []).append(kind)
    factors = "; ".join(f"{name} x{rates[name]:g}: {', '.join(kinds)}" for name, kinds in by_precision.items())
    return "\n".join(
        [
            "Assumptions:",
            "  Decoding counts 2 FLOPs for each active matrix element but the input embedding and MTP, the attention",
            "  over what is seen (mla and dsa absorbed), and the indexers' scores of all entries; no elementwise work.",
            f"  FP8 equivalents: {factors}.",
            "  KV cache as deployed: an entry of V4 is 448 fp8 + 64 bf16 values + 8 bytes of scales (584 bytes), its",
            "  index key 128 fp4 + 4 (68), V3.2's 512 fp8 + 64 bf16 + 16 (656) and 128 fp8 + 4 (132), all else bf16.",
            "  Parameters leave out MTP; active ones the input embedding too. The report publishes no accounting:",
            "  of those tried, this one gives its ratios.",
        ]
    )


def rendered(table: Table) -> str:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def curve(model: ModelConfig, options: EstimateConfig) -> list[dict[str, float]]:
    """At each context of CURVE: FLOPs of a decoded token, the same in FP8's, cache bytes of a row as deployed."""
    points = []
    for context in CURVE:
        flops = decode_by_product(model, context)
        weighted = fp8_equivalents(flops, options.precisions, options.rates)
        point = {"context": context, "decode_flops": sum(flops.values()), "decode_fp8_flops": sum(weighted.values())}
        points.append(point | {"kv_bytes": deployed_cache_bytes(model, context)})
    return points


def check_plot(path: Path) -> None:
    """Make its folder. Raises ConfigError where it can't be written: now, not after all the figures."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "estimate.plot", path, f"it can't be written ({error.strerror})", "name another file"
        ) from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError("estimate.plot", path, "it can't be written", "name another file")


def plot(models: dict[str, ModelConfig], options: EstimateConfig, path: Path) -> None:
    """FLOPs and cache against the context, each model a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, model in models.items():
        points = curve(model, options)
        for ax, key, unit in zip(axes, ("decode_fp8_flops", "kv_bytes"), (1e9, GIB), strict=True):
            ax.plot(CURVE, [point[key] / unit for point in points], marker="o", markersize=3, label=name)
    for ax, what in zip(axes, ("GFLOPs (FP8) of a decoded token", "KV cache of a row, GiB"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel=what)
        ax.set_xticks(CURVE, [f"{c // 1024}K" if c < 2**20 else "1M" for c in CURVE])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError("estimate.plot", path, f"it can't be written ({error})", "name a .png file") from error
    finally:
        pyplot.close(figure)


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
