"""Print the table of docs/attention.md: what each attention kind caches, and what decoding one token costs.

    python tools/attention_table.py
    python tools/attention_table.py model=gpt_oss_small contexts=1024,8192 steps=64

`contexts` are numbers of tokens that a row holds; times are of the `steps` tokens up to each of them, on the CPU. All
else is an override of conf/, as in launch/pretrain.py. The caches are filled with random numbers: how long a step takes
does not depend on them, and a prefill of 64K tokens is quadratic.
"""

import math
import sys
import time
from dataclasses import dataclass, replace

import torch

from v4train.analysis.flops import decode_flops
from v4train.analysis.kv_cache import cache_bytes, cache_bytes_per_token
from v4train.config import load
from v4train.errors import ConfigError, refusing_bad_input
from v4train.model import ModelConfig, Transformer, model_config
from v4train.model.attention import KINDS
from v4train.model.attention.cache import BlockTail, LayerCache
from v4train.model.config import LayerAttention
from v4train.model.losses import Losses
from v4train.structured import wants_help

OWN = {"contexts": "1024,8192,65536", "steps": "128"}  # 128 tokens: a block of hca, whose work comes once a block
ROUNDS = 5  # the fastest counts
DILATION, GLOBAL_TOKENS = 4, 4  # of the rows that show them
BYTES = 4  # of an fp32 value
LONGFORMER = "arXiv 2004.05150"
V4 = "V4 report, arXiv 2606.19348"


@dataclass
class Row:
    """A layer to measure, and where it comes from."""

    word: str
    paper: str
    file: str


def rows(config: ModelConfig) -> list[Row]:
    """Every kind, and the local options of one."""
    window = f"gqa:window={config.attention.window}"
    return [
        Row("mha", "arXiv 1706.03762", "gqa"),
        Row("mqa", "arXiv 1911.02150", "gqa"),
        Row("gqa", "arXiv 2305.13245", "gqa"),
        Row(window, LONGFORMER, "local"),
        Row(f"{window}:dilation={DILATION}", LONGFORMER, "local"),
        Row(f"{window}:global_tokens={GLOBAL_TOKENS}", LONGFORMER, "local"),
        Row("mla", "V2 report, arXiv 2405.04434", "mla"),
        Row("dsa", "V3.2 report", "dsa"),
        Row("swa", V4, "swa"),
        Row("csa", V4, "csa"),
        Row("hca", V4, "hca"),
    ]


def formula(layer: LayerAttention) -> tuple[str, str]:
    """Values that a layer caches for each token, and those that don't grow (with `max_length` beyond the window)."""
    kind, options = layer.kind, layer.options
    if kind in ("mha", "mqa", "gqa", "mla"):
        width = {"mha": "2·H·D", "mqa": "2·D", "gqa": "2·G·D", "mla": "(L + R)"}[kind]
        if options.window is None:
            return width.strip("()"), "0"
        reach = "W" if options.dilation == 1 else "((W - 1)·d + 1)"
        return "0", f"{width}·({reach} + g)" if options.global_tokens else f"{width}·{reach}"
    v4 = {"swa": ("0", "D·W"), "csa": ("(D + J)/m", "D·W + (D + J)·(6·m - 4)"), "hca": ("D/m", "D·W + 2·D·(m - 1)")}
    return ("L + R + J", "0") if kind == "dsa" else v4[kind]


def symbols(config: ModelConfig, layer: LayerAttention) -> dict[str, int]:
    """Value of each letter of `formula` for this layer."""
    options = layer.options
    if layer.kind in ("mha", "mqa", "gqa"):
        values = {"H": options.num_heads, "G": options.num_kv_heads, "D": options.head_dim}
    elif layer.kind in ("mla", "dsa"):
        values = {"L": options.kv_lora_rank, "R": options.rope_dim, "J": config.attention.dsa.head_dim}
    else:
        ratios = {"csa": options.csa_compression, "hca": options.hca_compression}
        return {"D": options.head_dim, "W": options.window, "J": options.indexer.head_dim, "m": ratios.get(layer.kind)}
    return values | {"W": options.window, "d": options.dilation, "g": options.global_tokens}


def single(config: ModelConfig, word: str) -> ModelConfig:
    """The model cut down to one layer of this kind."""
    alone = replace(config, num_layers=1, attention_mix=[word], ffn_mix="dense")
    alone.moe, alone.mtp = replace(config.moe, num_hash_layers=0), replace(config.mtp, num_layers=0)
    return model_config(alone)


def measured_bytes(config: ModelConfig, max_length: int) -> int:
    """Of a real cache of one row, on the meta device."""
    with torch.device("meta"):
        return Transformer(config).new_cache(1, max_length).nbytes()


def measured_bytes_per_token(config: ModelConfig) -> float:
    """Growth between two lengths of whole blocks, a million tokens and more."""
    block = math.lcm(config.attention.csa_compression, config.attention.hca_compression)
    short = -(-(2**20) // block) * block
    return (measured_bytes(config, 2 * short) - measured_bytes(config, short)) / short


def set_length(cache: LayerCache, length: int) -> None:
    """The state after `length` tokens of each row, whatever the buffers hold."""
    cache.length = length
    for name, buffer in cache.buffers.items():
        if isinstance(buffer, BlockTail):
            buffer.blocks, buffer.count = divmod(length, buffer.waiting.shape[2] + 1)
        else:
            tail = cache.buffers.get(f"{name}_tail")
            stored = length if tail is None else length // (tail.waiting.shape[2] + 1)
            buffer.length = min(stored, buffer.data.shape[2])


class Decoder:
    """The attention of a one-layer model, and a full cache of one row for each context."""

    def __init__(self, config: ModelConfig, contexts: list[int]) -> None:
        self.attention = KINDS[config.layers[0].kind](config, Losses(), config.layers[0]).eval()
        self.x, self.documents = torch.randn(1, 1, config.hidden_size), torch.zeros(1, 1, dtype=torch.long)
        self.caches = {context: self.attention.new_cache(1, context) for context in contexts}
        buffers = [buffer for cache in self.caches.values() for buffer in cache.buffers.values()]
        with torch.no_grad():
            for tensor in [*self.attention.parameters(), *(tensor for buffer in buffers for tensor in buffer.tensors)]:
                tensor.normal_(std=config.init.std)

    @torch.no_grad()
    def seconds(self, context: int, steps: int) -> float:
        """Of one token: mean over the `steps` tokens up to `context`."""
        steps, cache = min(steps, context), self.caches[context]
        set_length(cache, context - steps)
        begin = time.perf_counter()
        for _ in range(steps):
            self.attention(self.x, self.documents, cache)
        return (time.perf_counter() - begin) / steps


def decode_seconds(configs: list[ModelConfig], contexts: list[int], steps: int) -> list[list[float]]:
    """Seconds a token of each one-layer model's attention at each context; kinds take turns, to make ratios fair."""
    decoders = [Decoder(config, contexts) for config in configs]
    rounds = [[[each.seconds(context, steps) for context in contexts] for each in decoders] for _ in range(ROUNDS)]
    return torch.tensor(rounds, dtype=torch.float64).amin(0).tolist()


def number(value: float) -> str:
    """A digit after the point, three digits in all below 10, thousands separated: 1,234, 126.5, 0.123."""
    return f"{value:.3g}" if value < 10 else f"{value:,.1f}".removesuffix(".0")


def joined(values: list[float]) -> str:
    """A number for each context."""
    return " / ".join(number(value) for value in values)


def agreed(formulas: list[float], measured: list[float]) -> str:
    """One list if both say the same, else both."""
    return joined(measured) if formulas == measured else f"{joined(measured)} (formula: {joined(formulas)})"


def costs(config: ModelConfig, contexts: list[int]) -> list[str]:
    """Cells about a one-layer model that are the same on every machine: formulas, bytes per token, KiB, MFLOP."""
    layer = config.layers[0]
    sizes = [cache_bytes(config, 1, context, BYTES) / 1024 for context in contexts]
    real = [measured_bytes(config, context) / 1024 for context in contexts]
    growth = agreed([cache_bytes_per_token(config, layer, BYTES)], [measured_bytes_per_token(config)])
    flops = [sum(decode_flops(config, layer, context).values()) / 1e6 for context in contexts]
    return [*formula(layer), growth, agreed(sizes, real), joined(flops)]


def table(config: ModelConfig, contexts: list[int], steps: int) -> list[str]:
    """Lines of Markdown, one a kind."""
    at = " / ".join(f"{context // 1024}K" if context % 1024 == 0 else str(context) for context in contexts)
    columns = ["kind", "values per token", "values once", "bytes per token", f"KiB at {at}", f"MFLOP at {at}"]
    columns += [f"ms at {at}", "ms / mha's", "paper", "file"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    alone = {row.word: single(config, row.word) for row in rows(config)}
    measured = decode_seconds(list(alone.values()), contexts, steps)
    for row, times in zip(rows(config), measured, strict=True):
        cells = [f"`{row.word}`", *costs(alone[row.word], contexts)]
        cells.append(" / ".join(f"{1000 * seconds:.2f}" for seconds in times))
        cells.append(" / ".join(f"{seconds / first:.2f}" for seconds, first in zip(times, measured[0], strict=True)))
        cells += [row.paper, f"[{row.file}.py](../v4train/model/attention/{row.file}.py)"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def legend(config: ModelConfig) -> str:
    """What the letters mean, and their values."""
    words = ["gqa", "mla", "dsa", "csa", "hca"]
    values = {word: symbols(config, single(config, word).layers[0]) for word in words}
    heads, latent, index, csa, hca = values.values()
    window = config.attention.window
    return (
        f"mha, mqa, gqa: heads H={heads['H']}, KV heads G={heads['G']}, head width D={heads['D']}, window W={window}, "
        f"dilation d={DILATION}, global tokens g={GLOBAL_TOKENS}. mla, dsa: latent L={latent['L']}, rotated key "
        f"R={latent['R']}, index key J={index['J']}. swa, csa, hca: head width D={csa['D']}, window W={window}, index "
        f"key J={csa['J']}, compression m={csa['m']} in csa and {hca['m']} in hca."
    )


def whole_numbers(key: str, text: str) -> list[int]:
    """`1024,8192` as a list. Raises ConfigError."""
    numbers = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in numbers):
        raise ConfigError(key, text, "it must be whole numbers above 0", f"write e.g. {key}={OWN[key]}")
    return [int(part) for part in numbers]


def main(arguments: list[str]) -> None:
    if wants_help(arguments):
        return print(__doc__)
    own = OWN | dict(argument.split("=", 1) for argument in arguments if argument.partition("=")[0] in OWN)
    contexts, steps = whole_numbers("contexts", own["contexts"]), whole_numbers("steps", own["steps"])[0]
    config = model_config(load([argument for argument in arguments if argument.partition("=")[0] not in OWN]).model)
    print(
        f"One layer of each kind, with the options of `{config.name}`: fp32, one row, CPU, {torch.get_num_threads()} "
        f"thread(s), torch {torch.__version__}. Bytes are of a real cache, FLOPs by formula; times are of the "
        f"attention alone, the mean of the {steps} tokens up to that context, the best of {ROUNDS} rounds.\n"
    )
    print("\n".join(table(config, contexts, steps)))
    print("\n" + legend(config))


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
