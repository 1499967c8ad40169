"""Checkpoints (DESIGN 10): safetensors keyed by canonical parameter name, and a JSON manifest. Nothing is pickled.

    checkpoints/step_00000100/
        manifest.json               step, trainer state, configuration, SHA-256 of every file
        weight-00000.safetensors    fp32 masters by canonical name, of what rank 0 holds: whole, or slices
        exp_avg-00000.safetensors   and so on: one file for each optimizer state and rank
        buffers-00000.safetensors   router biases and hash tables, one file for each pipeline stage
    routing-00000.safetensors   experts chosen beforehand for coming steps (anticipatory routing), where there are any

Each rank writes what it holds (checkpoint_writer.py): a tensor that is whole on one rank as it is, any other in slices
whose names say where in the whole they lie (parallel/slices.py). So any number of ranks, in any layout, can read them.
Files are mapped, and a rank reads no block that it has no part of.
"""

import hashlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from v4train.durable import sha256_of
from v4train.errors import ConfigError
from v4train.model import Transformer, build_model
from v4train.parallel.slices import Box, Slice, assembled

FORMAT = 2  # raised when an older reader would misread the files; 1 had whole tensors, and no checksum of the manifest
MANIFEST = "manifest.json"
BUFFERS = "buffers"
ROUTING = "routing"
REPLACED = "-replaced"  # end of the name of one that another of the same step takes the place of

logger = logging.getLogger("v4train")


@dataclass
class CheckpointConfig:
    """Values and their meaning: conf/checkpoint/default.yaml."""

    every: int
    keep: int
    keep_every: int
    resume: str

    def __post_init__(self) -> None:
        for key in ("every", "keep", "keep_every"):
            if getattr(self, key) < 0:
                raise ConfigError(f"checkpoint.{key}", getattr(self, key), "it can't be negative", "use 0 for none")
        if self.resume in ("auto", "never"):
            return
        if not (Path(self.resume) / MANIFEST).is_file() and not any(Path(self.resume).glob("checkpoints/step_*")):
            rule = "neither auto nor never nor the folder of a checkpoint, or of a run that has one"
            raise ConfigError("checkpoint.resume", self.resume, rule, "give e.g. runs/NAME/checkpoints/step_00000100")


def newest(folder: Path) -> Path | None:
    """The newest checkpoint under `folder` that is whole; torn or altered ones are named in a warning and skipped."""
    return next(whole(folder), None)


def whole(folder: Path) -> Iterator[Path]:
    """The checkpoints under `folder` that are whole, newest first; others are named in a warning."""
    for path in sorted(folder.glob("step_*"), key=step_of, reverse=True):
        problem = damage(path)
        if problem is None:
            yield path
        else:
            logger.warning("checkpoint %s is damaged (%s); using the one before", path, problem)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file is held against its SHA-256."""
    try:
        manifest = read_manifest(path)
        for name, digest in manifest["files"].items():
            if sha256_of(path / name) != digest:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{MANIFEST} is not readable ({error})"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises OSError, or ValueError for one that was altered or is of another format."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    if manifest["format"] not in (1, FORMAT):
        raise ValueError(f"checkpoint format {manifest['format']}, this version reads 1 and {FORMAT}")
    digest = manifest.pop("sha256", None)
    if digest != (None if manifest["format"] == 1 else _digest(manifest)):
        raise ValueError("the manifest does not match its checksum")
    return manifest


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """What a manifest's file holds: the manifest, and the SHA-256 of it."""
    return json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1).encode()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


_Place = tuple[
    Slice | None, Any, str
]  # a piece (None: the whole tensor), the open file that holds it, and its key there


class Reader:
    """Tensors of one checkpoint, read when asked for: any rank may read any of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, read_manifest(path)
        self._buffers: list[Path] = []
        self._where: dict[str, dict[str, list[_Place]]] = defaultdict(lambda: defaultdict(list))  # by name and kind
        self._routing: dict[str, list[_Place]] = defaultdict(list)
        for file_name in self.manifest["files"]:
            kind = file_name.removesuffix(".safetensors").partition("-")[0]
            if kind == BUFFERS:
                self._buffers.append(path / file_name)
            else:
                file = safe_open(path / file_name, framework="pt")
                for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    piece = Slice.of_key(key)
                    name = piece.name if piece else key
                    places = self._routing[name] if kind == ROUTING else self._where[name][kind]
                    places.append((piece, file, key))

    def close(self) -> None:
        """Let go of the files; the manifest stays."""
        self._where.clear()
        self._routing.clear()

    def parameter(self, name: str, box: Box | None = None) -> dict[str, Tensor]:
        """CPU tensors of a parameter by kind (`weight`, `exp_avg`, ...): what lies at `box`, or whole (None).

        Nothing for a name that isn't there. Raises ValueError where values are missing.
        """
        return {kind: _read(places, box) for kind, places in self._where.get(name, {}).items()}

    def routing(self, name: str, box: Box) -> Tensor:
        """What lies at `box` of the experts chosen for a coming step (`Anticipation.local_state`)."""
        return _read(self._routing[name], box)

    def weights(self) -> dict[str, Tensor]:
        """All parameters by canonical name, fp32, without the optimizer's state."""
        return {name: _read(places["weight"], None) for name, places in self._where.items()}

    def buffers(self) -> dict[str, Tensor]:
        """All buffers by canonical name."""
        return {name: tensor for path in self._buffers for name, tensor in load_file(path).items()}


def _read(places: list[_Place], box: Box | None) -> Tensor:
    piece, file, key = places[0]
    if piece is not None:
        return assembled(((piece, file.get_tensor(key)) for piece, file, key in places), box)
    whole = file.get_tensor(key)  # mapped
    return whole[box] if box and whole.dim() else whole


def load_model(path: Path) -> Transformer:
    """The model of a checkpoint, on the CPU, in eval mode and the attention mode it was trained in; the optimizer's
    state is not read."""
    reader = Reader(path)
    state = reader.manifest["state"]
    config = state["config"]
    with torch.device("meta"):
        model = build_model(OmegaConf.create(config["model"]))
    weights = reader.weights()
    if model.config.tie_embedding:  # one parameter, by its first name
        weights["head.lm_head.weight"] = weights["embedding.lookup.weight"]
    model.load_state_dict(weights | reader.buffers(), assign=True)
    of_the_run = config["train"].get("attention_mode", "sparse")
    model.attention_mode = state.get("attention_mode", of_the_run)  # absent: older than the keys
    return model.eval()


def prune(folder: Path, step: int, keep: int, keep_every: int) -> None:
    """Leave the `keep` newest up to `step`, and for good those whose step is a multiple of `keep_every`.

    What lies beyond is a future that a damaged checkpoint cut off: it goes too, where it is damaged.
    """
    paths = sorted((path for path in folder.glob("step_*") if step_of(path) >= 0), key=step_of)
    later = [path for path in paths if step_of(path) > step]
    present = paths[: len(paths) - len(later)]
    old = present[: max(0, len(present) - keep)] if keep else []
    old = [path for path in old if not (keep_every and step_of(path) % keep_every == 0)]
    for path in [*(path for path in later if _is_torn(path)), *old]:
        shutil.rmtree(path, ignore_errors=True)


def _is_torn(path: Path) -> bool:
    """Whether it is damaged for good: not one of a newer format, or that can't be read just now."""
    try:
        files = read_manifest(path)["files"]
        return any(sha256_of(path / name) != digest for name, digest in files.items())
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def remove_leftovers(folder: Path) -> None:
    """What killed and failed attempts have left. Only where nobody writes."""
    for path in folder.glob(f".step_*{REPLACED}"):  # killed between two names
        final = folder / path.name[1:].partition("-")[0]
        if not final.exists():
            path.rename(final)
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    """Of a checkpoint's folder; -1 for a name that isn't one's."""
    number = path.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1
