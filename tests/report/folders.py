"""Run folders as a run leaves them, made up: curves that are known exactly."""

import json
import math
from pathlib import Path

from omegaconf import OmegaConf

from v4train.config import load

SAMPLE = 'import os\n\n\ndef <b>f</b>():\n    return "&amp;"'


def make_run(folder: Path, name: str, overrides: tuple[str, ...] = (), steps: int = 60, offset: float = 0.0) -> Path:
    """A run of `steps` steps of 2048 tokens and half a second, whose validation loss at the end is 3 + offset."""
    path = folder / name
    path.mkdir(parents=True)
    config = load(["model=flash_small", f"run.name={name}", f"run.dir={path}", *overrides])
    (path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    lines = []
    for step in range(1, steps + 1):
        lines.append(step_record(step, steps, offset))
        if step % 20 == 0 or step == steps:
            loss = 3 + offset + 5 * math.exp(-step / 10) * (step < steps)
            bits = {"val_loss": loss, "val_bits_per_byte": loss / 2, "val_gain_over_unigram": 6 - loss}
            lines.append({"step": step, "tokens": step * 2048, "unigram_entropy": 6.0, **bits})
            recall = {"eval/recall/32": 0.9 + offset / 10, "eval/recall/64": step / 100, "eval/recall/128": None}
            lines.append({"step": step, "tokens": step * 2048, **recall})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "samples.txt").write_text(SAMPLE + "\n")
    return path


def step_record(step: int, steps: int, offset: float) -> dict:
    loss = 3 + offset + 5 * math.exp(-step / 10)
    record = {"step": step, "tokens": step * 2048, "loss": loss + 0.5, "lm_loss": loss, "mtp_loss": loss + 0.2}
    record |= {"balance_loss": 1.02, "indexer_kl": 0.5 / step, "indexer_recall": 0.6, "indexer_captured": 0.3}
    record |= {"lr": 1e-3 * step / steps, "grad_norm": 1 + 10 / step, "skipped": step == 7, "max_violation": 4 / step}
    record |= {"tokens_per_second": 4096.0, "mfu": 0.25, "memory_gib": 1.0 + step / steps, "step_seconds": 0.5}
    record |= {"attention_mode": "dense" if step <= 30 else "sparse", "phase": int(step > 30)}
    record |= {"sequence_length": 512, "global_batch_size": 4, "slowest_rank": int(step % 4 == 0)}
    parts = {"data": 0.01, "forward": 0.15, "backward": 0.25, "optimizer": 0.05, "wait": 0.03}
    record |= {f"{name}_seconds": seconds for name, seconds in parts.items()}
    record["max_violation_by_layer"] = {"blocks.3": 2 / step, "mtp": 4 / step}
    if step % 20 == 0:
        names = [f"blocks.{layer}" for layer in range(6)]
        record["layers"] = {n: {"activation_rms": 1.0 + i, "update_ratio": 1e-3 / (i + 1)} for i, n in enumerate(names)}
        for i, name in enumerate(names):
            record["layers"][name] |= {"gain_forward": 1.0 + i * step, "gain_backward": 100.0 - i * step}
        record["expert_load"] = {f"{name}.ffn.router": [0.5, 1.0, 1.5, 1.0] for name in names[3:]}
    return record
