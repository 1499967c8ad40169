"""Checkpoints (DESIGN 10): safetensors keyed by canonical parameter name, and a JSON manifest. Nothing is pickled.

    checkpoints/step_00000100/
        manifest.json               step, trainer state, configuration, SHA-256 of every file
        weight-00000.safetensors    fp32 master of each parameter, whole, by canonical name
        exp_avg-00000.safetensors   and so on: one file for each optimizer state and writing rank
        buffers-00000.safetensors   router biases and hash tables, one file for each pipeline stage

Each rank writes the tensors that fall to it; names and shapes do not depend on the layout, so any number of ranks can
read them. A checkpoint is written under a temporary name and renamed when it is complete on disk.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from v4train.errors import ConfigError
from v4train.model import Transformer, build_model

FORMAT = 1  # raised when an older reader would misread the files
MANIFEST = "manifest.json"
BUFFERS = "buffers"

logger = logging.getLogger("v4train")


@dataclass
class CheckpointConfig:
    """Values and their meaning: conf/checkpoint/default.yaml."""

    every: int
    keep: int
    resume: str

    def __post_init__(self) -> None:
        for key in ("every", "keep"):
            if getattr(self, key) < 0:
                raise ConfigError(f"checkpoint.{key}", getattr(self, key), "it can't be negative", "use 0 for none")
        if self.resume in ("auto", "never"):
            return
        if not (Path(self.resume) / MANIFEST).is_file() and not any(Path(self.resume).glob("checkpoints/step_*")):
            rule = "neither auto nor never nor the folder of a checkpoint, or of a run that has one"
            raise ConfigError("checkpoint.resume", self.resume, rule, "give e.g. runs/NAME/checkpoints/step_00000100")


def save(
    folder: Path,
    step: int,
    parameters: Iterator[tuple[str, dict[str, Tensor]]],
    buffers: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    stages: int = 1,
) -> Path:
    """Write `folder/step_XXXXXXXX` and remove all but the `keep` newest (0: keep all). Collective.

    Args:
        parameters: (canonical name, whole CPU tensors by state name), the same sequence on every rank of a stage.
        buffers: whole CPU tensors by canonical name, equal on every rank of a stage.
        state: JSON-able state of the trainer.
        stages: the pipeline's, equally many consecutive ranks each, which have different tensors.
    """
    rank, world = _rank_and_world()
    writers = world // stages
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier()
    written: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for index, (name, tensors) in enumerate(parameters):
        if index % writers == rank % writers:
            for kind, tensor in tensors.items():
                written[f"{kind}-{rank:05d}"][name] = tensor.contiguous()
    if rank % writers == 0:
        written[f"{BUFFERS}-{rank:05d}"] = {name: tensor.contiguous() for name, tensor in buffers.items()}
    digests = {}
    for stem, tensors in written.items():
        path = temporary / f"{stem}.safetensors"
        save_file(tensors, path)
        digests[path.name] = _sha256(path, durable=True)
    files = _gather(digests)
    if rank == 0:
        manifest = {"format": FORMAT, "step": step, "world_size": world, "state": state, "files": files}
        _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync_folder(folder)
        _prune(folder, step, keep)
    _barrier()
    return final


def newest(folder: Path) -> Path | None:
    """The newest checkpoint under `folder` that is whole; torn or altered ones are named in a warning and skipped."""
    for path in sorted(folder.glob("step_*"), key=_step, reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("checkpoint %s is damaged (%s); using the one before", path, problem)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file is held against its SHA-256."""
    try:
        manifest = read_manifest(path)
        for name, digest in manifest["files"].items():
            if _sha256(path / name) != digest:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises OSError, or ValueError for one of another format."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    if manifest["format"] != FORMAT:
        raise ValueError(f"checkpoint format {manifest['format']}, this version reads {FORMAT}")
    return manifest


class Reader:
    """Tensors of one checkpoint, read when asked for: any rank may read any of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, read_manifest(path)
        self._buffers: list[Path] = []
        self._where: dict[str, dict[str, Any]] = defaultdict(dict)  # name -> state name -> open file
        for file_name in self.manifest["files"]:
            kind = file_name.removesuffix(".safetensors").partition("-")[0]
            if kind == BUFFERS:
                self._buffers.append(path / file_name)
            else:
                file = safe_open(path / file_name, framework="pt")
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    self._where[name][kind] = file

    def parameter(self, name: str) -> dict[str, Tensor]:
        """Whole CPU tensors of a parameter by state name (`weight`, `exp_avg`, ...)."""
        return {kind: file.get_tensor(name) for kind, file in self._where[name].items()}

    def weights(self) -> dict[str, Tensor]:
        """All parameters by canonical name, fp32, without the optimizer's state."""
        return {name: files["weight"].get_tensor(name) for name, files in self._where.items()}

    def buffers(self) -> dict[str, Tensor]:
        """All buffers by canonical name."""
        return {name: tensor for path in self._buffers for name, tensor in load_file(path).items()}


def load_model(path: Path) -> Transformer:
    """The model of a checkpoint, on the CPU, in eval mode and the attention mode it was trained in; the optimizer's
    state is not read."""
    reader = Reader(path)
    config = reader.manifest["state"]["config"]
    with torch.device("meta"):
        model = build_model(OmegaConf.create(config["model"]))
    weights = reader.weights()
    if model.config.tie_embedding:  # one parameter, by its first name
        weights["head.lm_head.weight"] = weights["embedding.lookup.weight"]
    model.load_state_dict(weights | reader.buffers(), assign=True)
    model.attention_mode = config["train"].get("attention_mode", "sparse")  # absent: older than the key
    return model.eval()


def _prune(folder: Path, step: int, keep: int) -> None:
    """Leave the `keep` newest up to `step`; what lies beyond is a future that a damaged checkpoint cut off."""
    abandoned = [path for path in folder.glob("step_*") if _step(path) > step]
    for path in [*abandoned, *folder.glob(".step_*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)
    paths = sorted(folder.glob("step_*"), key=_step)
    for path in paths[: len(paths) - keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    number = path.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1


def _sha256(path: Path, durable: bool = False) -> str:
    with path.open("rb") as file:
        if durable:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _gather(digests: dict[str, str]) -> dict[str, str]:
    """All ranks' entries, on every rank."""
    if not dist.is_initialized():
        return digests
    parts: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, digests)
    return {name: digest for part in parts for name, digest in sorted(part.items())}
