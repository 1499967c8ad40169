"""README.md of an exported model: what it is, how it was trained, its figures, how to use it, what stays behind."""

import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from v4train.analysis.parameters import parameter_counts
from v4train.data import Tokenizer
from v4train.hf.tokenizer import special_tokens
from v4train.model import ModelConfig
from v4train.train.metrics import read_metrics

FIGURES = {
    "val_loss": "validation loss, nats/token",
    "val_bits_per_byte": "validation, bits/byte",
    "unigram_entropy": "entropy of the validation tokens without context, nats/token",
    "val_tokens": "validation tokens",
}


class Subject(NamedTuple):
    """What a card is about. attention_mode: None where no layer has an indexer. checked: what was found when
    transformers loaded the directory."""

    manifest: dict[str, Any]  # of the checkpoint
    model: ModelConfig
    architecture: str
    tokenizer: Tokenizer
    metrics: Path  # of the run
    dtype: str
    attention_mode: str | None
    checked: str


def model_card(subject: Subject) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads. The licence is left to who publishes."""
    name = subject.manifest["state"]["config"]["run"]["name"]
    sections = {
        "Model": _table(_model(subject)),
        "Training": _table(_training(subject)),
        "Figures": _table(_figures(subject)),
        "Use": _use(subject),
        "What to know": "\n".join(f"- {note}" for note in _notes(subject)),
    }
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- v4train"]
    text = ["---", *front, "---", "", f"# {name}", ""]
    text.append(
        f"A base language model, pretrained with v4train; transformers loads it as `{subject.architecture}`. "
        f"Step {subject.manifest['step']:,} of the run."
    )
    for title, body in sections.items():
        text += ["", f"## {title}", "", body]
    return "\n".join(text) + "\n"


def _model(subject: Subject) -> dict[str, Any]:
    model, mix = subject.model, subject.model.attention_mix
    total, active = parameter_counts(model)
    experts = (
        f"{model.moe.num_experts} experts, {model.moe.top_k} and {model.moe.num_shared_experts} shared for a token"
    )
    return {
        "parameters": f"{total:,}, of which {active:,} active for a token",
        "layers": f"{model.num_layers}: `{mix if isinstance(mix, str) else ' '.join(mix)}`",
        "feed-forward": ", ".join(experts if kind == "moe" else kind for kind in sorted(set(model.ffn_kinds))),
        "residual": model.residual.kind,
        "hidden size": model.hidden_size,
        "vocabulary": f"{subject.tokenizer.vocab_size:,} entries ({model.vocab_size:,} rows of the embedding)",
        "weights": subject.dtype,
    }


def _training(subject: Subject) -> dict[str, Any]:
    state, config = subject.manifest["state"], subject.manifest["state"]["config"]
    train = config["train"]
    sources = state["loader"]["progress"]["by_source"]
    return {
        "tokens": f"{state['tokens']:,}",
        "data": "; ".join(f"{name}: {count:,} tokens{_place(name, config['data'])}" for name, count in sources.items())
        or "none yet",
        "sequence length": f"{train['sequence_length']:,} tokens: what it was trained on, whatever config.json allows",
        "batch": f"{train['global_batch_size']} sequences",
        "optimizer": f"{config['optimizer']['name']}, learning rate {config['schedule']['learning_rate']}",
        "precision": config["precision"],
        **({"attention": subject.attention_mode} if subject.attention_mode else {}),
        "seed": config["seed"],
    }


def _place(name: str, data: dict[str, Any]) -> str:
    """Where a source is, as far as others can know it: of a path on this machine no more than its last part."""
    source = (data.get("sources") or {}).get(name) or data
    paths = source.get("path")
    paths = paths if isinstance(paths, list) else [paths] if paths else []
    shown = []
    for path in map(str, paths):
        url = urlsplit(path)
        if url.scheme in ("http", "https"):
            shown.append(f"{url.scheme}://{url.hostname}{url.path}")  # without credentials
        else:
            shown.append(path if not re.match(r"[/~.]|\w:", path) else Path(path).name)
    shown += [str(source["name"])] if source.get("name") else []
    return f" ({', '.join(f'`{part}`' for part in shown)})" if shown else ""


def _figures(subject: Subject) -> dict[str, Any]:
    step, found = subject.manifest["step"], subject.manifest["state"]["validation"]
    figures = {f"{label}, at step {found['step']:,}": found[key] for key, label in FIGURES.items() if key in found}
    records = read_metrics(subject.metrics) if subject.metrics.is_file() else []
    for record in records:
        if record["step"] == step and "lm_loss" in record:
            figures[f"training loss of step {step:,}, nats/token"] = record["lm_loss"]
    return {label: f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for label, value in figures.items()}


def _use(subject: Subject) -> str:
    return """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("import os\\n", return_tensors="pt")  # begins with BOS, as in training
output = model.generate(**inputs, max_new_tokens=64, do_sample=True, temperature=0.8, top_p=0.95)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""


def _notes(subject: Subject) -> list[str]:
    names = {key: f"`{name}`" for key, name in special_tokens(subject.tokenizer).items()}
    fim = subject.tokenizer.fim_ids
    notes = [
        f"Checked when it was written: transformers' logits in fp32 equal v4train's ({subject.checked}).",
        f"A document is {names['bos_token']}, text, {names['eos_token']}; `tokenizer(text)` puts "
        f"{names['bos_token']} first, `add_special_tokens=False` leaves it out.",
        "A special token's name in a text is ordinary text, as in training (`split_special_tokens`)"
        + ("; `tokenizer(text, split_special_tokens=False)` reads the names, for fill-in-middle." if fim else "."),
    ]
    if subject.model.mtp.num_layers:
        notes.append("The multi-token-prediction block stays behind: transformers has no place for it.")
    if subject.attention_mode not in (None, "sparse"):
        notes.append(
            f"The run's attention is `{subject.attention_mode}`: it has learnt to attend to all entries, not to the "
            "indexers' top-k, so `index_topk` holds them all here."
        )
    notes.append("Optimizer state, data position and the rest of a checkpoint stay in the run.")
    notes.append("No licence is stated: whoever publishes this model chooses one, with the data's terms in mind.")
    return notes


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
