"""Runs of a tiny model on a tiny corpus, for tests of training: every mechanism, a few seconds."""

import json
import sysconfig
from pathlib import Path

from v4train.train.metrics import read_metrics

STEPS = 10

TINY = [
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.attention.num_heads=4",
    "model.attention.head_dim=16",
    "model.attention.rope_dim=8",
    "model.attention.q_lora_rank=16",
    "model.attention.o_lora_rank=8",
    "model.attention.window=16",
    "model.attention.hca_compression=16",
    "model.attention.indexer.num_heads=2",
    "model.attention.indexer.head_dim=8",
    "model.attention.indexer.top_k=5",
    "model.moe.num_experts=8",
    "model.moe.top_k=2",
    "model.moe.intermediate_size=16",
    "model.num_layers=3",
    "model.attention_mix=[swa,csa,hca]",
    "train.sequence_length=96",
    "train.global_batch_size=4",
    f"train.max_steps={STEPS}",
    "train.validate_every=0",
    "train.validation_tokens=500",
    "train.sample_tokens=0",
    "checkpoint.every=0",
    "tracking.mode=disabled",
    "data=text",
    "data.validation_fraction=0.2",
    "device=cpu",
]

# The kinds that the mix above lacks, V3's and gpt-oss's routers, dense layers, hyper-connections, a tied embedding
MIXED = [
    "model.tie_embedding=true",
    "model.attention_mix='gqa:window=9:dilation=2:global_tokens=2:sink=true mla dsa'",
    "model.attention.gqa.bias=true",
    "model.attention.gqa.qk_norm=true",
    "model.attention.dsa.top_k=20",
    "model.ffn_mix='dense moe'",
    "model.moe.num_hash_layers=0",
    "model.moe.scoring=softmax",
    "model.moe.num_groups=4",
    "model.moe.top_k_groups=2",
    "model.moe.router_bias=true",
    "model.moe.expert_bias=true",
    "model.moe.activation=swiglu_oai",
    "model.residual.kind=hc",
    "model.mtp.attention=mqa",
]


def corpus(folder: Path) -> Path:
    """A dozen short documents, so that a row of 96 tokens often holds several."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py").read_text().splitlines()
    for number in range(24):
        (folder / f"{number:02}.txt").write_text("\n".join(lines[number * 12 : number * 12 + 12]))
    return folder


def tiny(base: Path, name: str, *overrides: str) -> list[str]:
    """Overrides of a tiny run called `name`; its folder is `base/name`."""
    data = base / "corpus"
    if not data.exists():
        corpus(data)
    where = [f"data.path={data}", f"tokenizer.cache_dir={base / 'cache'}", f"run.dir={base / name}"]
    return [*TINY, *where, f"run.name={name}", *overrides]


def losses(base: Path, name: str, key: str = "loss") -> list[float]:
    """Training losses of a run, by step."""
    records = [record for record in read_metrics(base / name / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record[key] for record in records]


def checkpoint_digests(base: Path, name: str, step: int) -> dict[str, str]:
    """SHA-256 of each tensor file of a checkpoint."""
    manifest = base / name / "checkpoints" / f"step_{step:08d}" / "manifest.json"
    return json.loads(manifest.read_text())["files"]
