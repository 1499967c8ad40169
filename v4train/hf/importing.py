"""From a directory of transformers to a run that has taken no step, for pretraining to continue from.

imported/
    conf/model/imported.yaml     the model, for `--config-dir=imported/conf model=imported`
    tokenizer.json               the directory's
    config.yaml, checkpoints/    as a run leaves them, at step 0: fresh optimizer state, no data read
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from v4train.config import Settings, load, settings
from v4train.data import BatchConfig, Loader, load_data, merged_states
from v4train.errors import ConfigError
from v4train.hf import from_hf
from v4train.hf.compare import Agreement, compare, sample_ids
from v4train.hf.export import require_transformers
from v4train.hf.folder import check_free, new_folder
from v4train.model import ModelConfig, Transformer, build_model
from v4train.optim.param_groups import param_groups
from v4train.parallel.optimizer_state import ADAMW_KEYS, MUON_KEYS, STEP, WEIGHT
from v4train.train import checkpoint, checkpoint_writer
from v4train.train.run_directory import RunDirectory

NAME = "imported"  # option of the config group `model`
TOKENIZER = "tokenizer.json"


class Imported(NamedTuple):
    """What was written, and what goes on from it. fresh: parameters that the directory lacks, newly initialised."""

    name: str
    parameters: int
    fresh: int
    agreement: Agreement
    arguments: list[str]  # of launch/pretrain.py


def import_model(source: str, out: str, overrides: list[str]) -> Imported:
    """Write `out`: a checkpoint of the model in the directory `source`, for a run with these overrides of conf/.

    Raises:
        ConfigError: no such model or tokenizer, `out` is taken, or an override is no good or changes the model's shape.
    """
    require_transformers()
    check_free(out)
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "model", source, "the folder holds no config.json", "name a directory that transformers loads"
        )
    own_tokenizer = any(override.startswith("tokenizer.path=") for override in overrides)
    if not own_tokenizer and not (folder / TOKENIZER).is_file():
        raise ConfigError("model", source, f"the folder holds no {TOKENIZER}", f"give tokenizer.path=.../{TOKENIZER}")
    description, state = from_hf(folder)
    with new_folder(out) as made:
        groups = made / "conf"
        write_model(description, groups / "model" / f"{NAME}.yaml", folder.name)
        needed = [f"model={NAME}"]
        if not own_tokenizer:
            needed.append(f"tokenizer.path={_quoted(str(Path(out) / TOKENIZER))}")
        places = [f"hydra.searchpath=[{_quoted(f'file://{groups}')}]", f"run.dir={_quoted(out)}"]
        checked = settings(load([*needed, *overrides, *places]))
        model = build_model(checked.model)
        fresh = load_weights(model, state)
        directory = RunDirectory(made)
        directory.prepare(False, checked.resolved)
        path = checked.tokenizer.path if own_tokenizer else str(folder / TOKENIZER)
        _save(checked, model, directory, path)
        agreement = _verify(directory, folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    start = [f"--config-dir={Path(out) / 'conf'}", *needed, f"checkpoint.resume={_quoted(out)}"]
    return Imported(description.name, count, fresh, agreement, [*start, *overrides])


def write_model(config: ModelConfig, path: Path, source: str) -> None:
    """An option of the config group `model`."""
    path.parent.mkdir(parents=True)
    header = f"# {source}, imported by tools/import_hf.py; what transformers doesn't record is the nearest preset's.\n"
    path.write_text(header + OmegaConf.to_yaml(OmegaConf.create(asdict(config))), encoding="utf-8")


def load_weights(model: Transformer, state: dict[str, Tensor]) -> int:
    """Put the directory's weights in; returns how many parameters of a new MTP block it has none for.

    Raises:
        ConfigError: another tensor is missing, too many or of another shape.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name.startswith("mtp.") and name not in state:
            continue  # model.mtp.num_layers=1: it starts anew
        found, wanted = (list(of[name].shape) if name in of else "absent" for of in (state, expected))
        if found != wanted:
            rule = f"the directory has {found}, the configuration asks for {wanted}"
            raise ConfigError(name, found, rule, "leave out what changes the model's shape")
    model.load_state_dict(state, strict=False)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in state)


def _save(checked: Settings, model: Transformer, directory: RunDirectory, tokenizer_path: str) -> None:
    """The tokenizer, and a checkpoint as the trainer writes it before the first step."""
    train = checked.train
    tokenizer_config = replace(checked.tokenizer, path=tokenizer_path)
    tokenizer, corpus = load_data(checked.data, tokenizer_config, train.validation_tokens)
    tokenizer.save(directory.tokenizer)
    batch = BatchConfig(train.global_batch_size, train.micro_batch_size, 0, 1)
    loader = Loader(corpus, checked.data, tokenizer, train.sequence_length, batch, checked.seed)
    state = {
        "tokens": 0,
        "loader": merged_states([loader.state_dict()]),
        "rng": torch.get_rng_state().numpy().tobytes().hex(),
        "validation": {},
        "wandb_id": None,
        "config": checked.resolved,
        "layout": asdict(checked.topology.sizes),
    }
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
    checkpoint_writer.save(directory.checkpoints, 0, _fresh_state(checked, model), buffers, state)


def _fresh_state(checked: Settings, model: Transformer) -> Iterator[tuple[str, str, Tensor]]:
    """What `Engine.local_state` gives before the first step."""
    use_muon = {name: group.use_muon for group in param_groups(model, checked.optimizer) for name in group.parameters}
    for name, parameter in model.named_parameters():
        yield WEIGHT, name, parameter.detach()
        for kind in MUON_KEYS if use_muon[name] else ADAMW_KEYS:
            yield kind, name, torch.zeros_like(parameter)
        if not use_muon[name]:
            yield STEP, name, torch.zeros(())


def _verify(directory: RunDirectory, folder: Path) -> Agreement:
    """The checkpoint's logits against transformers'."""
    from transformers import AutoModelForCausalLM

    from v4train.data import Tokenizer

    model = checkpoint.load_model(checkpoint.newest(directory.checkpoints))
    model.attention_mode = "sparse"  # transformers has no other
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return compare(model, peer, sample_ids(model, Tokenizer.load(directory.tokenizer)))


def _quoted(value: str) -> str:
    """A value of an override, as Hydra's grammar wants it."""
    if re.fullmatch(r"[\w./-]+", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def command(arguments: list[str]) -> str:
    """The command line that goes on from an imported model."""
    return shlex.join(["torchrun", "launch/pretrain.py", *arguments])
