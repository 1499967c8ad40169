"""From a checkpoint to a directory that `AutoModelForCausalLM` and `AutoTokenizer` load (`tools/export_hf.py`).

The directory takes its name only after transformers has loaded it and computed the same logits.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from v4train.data import Tokenizer
from v4train.errors import ConfigError
from v4train.hf import architecture_for, from_hf, to_hf
from v4train.hf.card import Subject, model_card
from v4train.hf.compare import Agreement, compare, sample_ids
from v4train.hf.folder import check_free, new_folder
from v4train.hf.tokenizer import check_tokenizer, write_tokenizer
from v4train.model import Transformer, model_config
from v4train.model.mix import INDEXED_KINDS
from v4train.train.checkpoint import load_model, read_manifest
from v4train.train.run_directory import find_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OTHER = "use another checkpoint"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EVEN = 8  # transformers 5.24's grouped_mm crashes on experts whose widths are no multiples (16 bytes of bf16)


@dataclass
class ExportConfig:
    """run: folder of a run or of one of its checkpoints. out: folder to write. dtype: of the weights, fp32 or bf16.
    max_shard_size: of a safetensors file, e.g. 5GB."""

    run: str
    out: str
    dtype: str
    max_shard_size: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError("dtype", self.dtype, "unknown type of weights", f"use one of {', '.join(DTYPES)}")
        if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", self.max_shard_size):
            rule = "a whole number above 0 and KB, MB or GB"
            raise ConfigError("max_shard_size", self.max_shard_size, rule, "for example 5GB")
        check_free(self.out)


class Exported(NamedTuple):
    """What was written, and how it was checked. rounding: what the weights' type changes of a logit, at most."""

    checkpoint: Path
    architecture: str
    parameters: int
    files: int
    bytes: int
    agreement: Agreement
    rounding: float


def export(config: ExportConfig, say: Callable[[str], None] = lambda stage: None) -> Exported:
    """Write the directory, load it with transformers, compare, and only then give it its name.

    say: told what is being done.

    Raises:
        ConfigError: the run or `out` is no good, transformers has no class for this model (naming the key), or what it
            loads computes something else. Nothing is left then.
    """
    require_transformers()
    directory, path = find_checkpoint(config.run)
    manifest = read_manifest(path)
    description = model_config(OmegaConf.create(manifest["state"]["config"]["model"]))
    architecture = architecture_for(description)
    architecture.settings(description)  # refuses before weights are read
    tokenizer = Tokenizer.load(directory.tokenizer)
    say(f"reading {path}")
    model = load_model(path)
    sample = sample_ids(model, tokenizer)
    with torch.no_grad():
        if not torch.isfinite(model(sample).logits).all():
            raise ConfigError("run", config.run, "the model has diverged: its logits are no numbers", OTHER)
    say(f"writing {config.out}")
    peer = to_hf(model)
    _add_tokens(peer, tokenizer)
    indexed = not set(INDEXED_KINDS).isdisjoint(description.layer_kinds)
    if indexed and model.attention_mode != "sparse":
        select_all(peer)
    if "moe" in description.ffn_kinds and (description.hidden_size % EVEN or description.moe.intermediate_size % EVEN):
        peer.config.experts_implementation = "eager"  # from_pretrained heeds it
    cast(peer, DTYPES[config.dtype])
    with new_folder(config.out) as made:
        write_tokenizer(tokenizer, made, manifest["state"]["config"]["train"]["sequence_length"])
        peer.save_pretrained(made, max_shard_size=config.max_shard_size)
        del peer
        check_tokenizer(tokenizer, made)
        say("loading it with transformers and comparing")
        agreement, rounding = verify(model, made, config.dtype, sample)
        checked = str(agreement) + (f"; bf16 weights move a logit by {rounding:.1e} at most" if rounding else "")
        about = (manifest, description, architecture.name, tokenizer, directory.metrics)
        card = model_card(Subject(*about, config.dtype, model.attention_mode if indexed else None, checked))
        (made / "README.md").write_text(card, encoding="utf-8")
        shards = list(made.glob("*.safetensors"))
        size = sum(shard.stat().st_size for shard in shards)
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("mtp."))
    return Exported(path, architecture.name, count, len(shards), size, agreement, rounding)


def require_transformers() -> None:
    """Raises ConfigError where it is not installed: the library itself does not need it."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("transformers", "missing", "the package is not installed", "pip install 'v4train[hf]'")


def _add_tokens(peer: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """The special tokens' ids, and no id without text when it generates."""
    from transformers import GenerationConfig

    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    for key, value in ids.items():
        setattr(peer.config, key, value)
    unused = list(range(tokenizer.vocab_size, peer.config.vocab_size))
    peer.generation_config = GenerationConfig(**ids, suppress_tokens=unused or None)


def select_all(peer: PreTrainedModel) -> None:
    """Let the indexers' top-k hold whatever there is: the dense attention that the run has trained."""
    config: Any = peer.config
    if hasattr(config, "index_topk"):
        rates = getattr(config, "compress_rates", {})
        config.index_topk = config.max_position_embeddings // rates.get("compressed_sparse_attention", 1)


def cast(peer: PreTrainedModel, dtype: torch.dtype) -> None:
    """Weights and buffers of another type, but for those that transformers itself keeps in fp32."""
    kept = peer._keep_in_fp32_modules_strict or ()
    for name, tensor in peer.state_dict().items():
        if tensor.is_floating_point() and not any(f".{part}." in f".{name}." for part in kept):
            owner, _, last = name.rpartition(".")
            module = peer.get_submodule(owner)
            getattr(module, last).data = tensor.to(dtype)
    peer.config.dtype = dtype


def verify(model: Transformer, folder: Path, dtype: str, sample: Tensor) -> tuple[Agreement, float]:
    """Weights and logits of what transformers loads from the folder, in fp32, against ours on a sample [B, S].

    Returns:
        The agreement with our model of the same weights, and what their rounding to `dtype` changes of a logit.

    Raises:
        ConfigError: something differs.
    """
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _, state = from_hf(peer)
    ours = model.state_dict()
    for name, tensor in state.items():
        rounded = ours[name].to(DTYPES[dtype]).to(ours[name].dtype) if tensor.is_floating_point() else ours[name]
        if not (torch.equal(tensor, ours[name]) or torch.equal(tensor, rounded)):
            raise ConfigError(name, "different", "it is not the checkpoint's once loaded", "nothing is written")
    with torch.no_grad():
        before = model(sample).logits
        model.load_state_dict(state, strict=False)  # the same weights as theirs; MTP keeps its own
        rounding = float((model(sample).logits - before).abs().max())
    return compare(model, peer, sample), rounding
