"""The folder of a run with one checkpoint of random weights, written without training: a second instead of twenty."""

from pathlib import Path

import torch

from tests.models import random_model
from tests.runs import corpus, tiny
from v4train.config import load, settings
from v4train.data import train_tokenizer
from v4train.train import checkpoint_writer
from v4train.train.run_directory import RunDirectory

PLAIN = ["model/residual=plain", "model.mtp.num_layers=0", "model.moe.num_hash_layers=0"]
LLAMA = [*PLAIN, "model.attention_mix=gqa*3", "model.ffn_mix=dense", "model.ffn.swiglu_limit=null"]
V3 = ["model=v3_small", "model.attention_mix=mla*3", "model.ffn_mix='dense moe'", "model.moe.num_groups=2"]
V32 = ["model=v32_small", "model.attention_mix=dsa*3", "model.attention.dsa.top_k=20"]
GPT_OSS = ["model=gpt_oss_small", "model.attention_mix='gqa:window=16 gqa gqa'"]


def untrained_run(base: Path, name: str, *overrides: str, step: int = 7) -> Path:
    """`base/name`. Overrides of `tests.runs.tiny`, which makes a flash-like model."""
    checked = settings(load(tiny(base, name, *overrides)))
    directory = RunDirectory(base / name)
    directory.prepare(False, checked.resolved)
    texts = [path.read_text() for path in sorted(corpus(base / "corpus").iterdir())]
    train_tokenizer(texts, checked.tokenizer.vocab_size).save(directory.tokenizer)
    model = random_model(checked.model, seed=3)
    with torch.no_grad():
        for buffer in model.buffers():
            if checked.model.moe.router_bias and buffer.is_floating_point():  # gpt-oss has none
                buffer.zero_()
    state = {
        "tokens": 2688,
        "loader": {"progress": {"by_source": {"text": 2600}}},
        "validation": {"step": step, "val_loss": 5.4321, "val_bits_per_byte": 2.5, "val_tokens": 500},
        "config": checked.resolved,
    }
    weights = (("weight", name, parameter.detach()) for name, parameter in model.named_parameters())
    checkpoint_writer.save(directory.checkpoints, step, weights, dict(model.named_buffers()), state)
    return directory.path
