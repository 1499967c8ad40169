"""Checkpoints are written while training goes on: a step's state is copied in memory, and a thread writes the copy.

The threads of several ranks may call no collectives, which the training does meanwhile. They meet in the checkpoint's
temporary folder: each rank leaves its files there and, last, `rank-00003.json` with their checksums. The thread of rank
0 waits for all of these, writes the manifest and gives the folder its name.
"""

import json
import os
import shutil
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from v4train import durable
from v4train.train.checkpoint import BUFFERS, FORMAT, MANIFEST, REPLACED, manifest_bytes, prune, remove_leftovers

POLL = 0.02  # seconds between looks for the other ranks' files
LATE = 20.0  # seconds after which a file that another rank has written must be seen

Parameters = Iterable[tuple[str, str, Tensor]]


class CheckpointWriter:
    """Writes checkpoints into a folder, one at a time. Every rank has one and calls its methods at the same steps."""

    def __init__(self, folder: Path, keep: int = 0, keep_every: int = 0) -> None:
        """Collective. keep, keep_every: which ones stay (`prune`)."""
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self._rank == 0:  # before any other begins to write
            remove_leftovers(folder)  # or they would take room for ever where there is too little for the next one
        self._process = _gathered(uuid.uuid4().hex[:8])[0]  # so that nobody takes a killed one's files for new ones
        self._attempts = 0
        self._attempt: _Attempt | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part: to be agreed on, and then `settle` to be called by all."""
        return self._attempt is not None and self._attempt.problem is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is writing."""
        return self._attempt is not None and self._attempt.thread.is_alive()

    def start(self, step: int, parameters: Parameters, buffers: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take a step's state and begin to write it. Every rank must; only after `settle`.

        Args:
            parameters: (kind, key, CPU tensor) of this rank's part (`Engine.local_state`); nobody changes the tensors
                afterwards.
            buffers: whole CPU tensors by canonical name that this rank is to write, which are copied.
            state: JSON-able state of the trainer; rank 0's is written.
        """
        files: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for kind, key, tensor in parameters:
            files[f"{kind}-{self._rank:05d}"][key] = tensor.contiguous()
        if buffers:
            files[f"{BUFFERS}-{self._rank:05d}"] = {name: tensor.clone() for name, tensor in buffers.items()}
        self._attempts += 1
        final = self._folder / f"step_{step:08d}"
        temporary = self._folder / f".{final.name}-{self._process}-{self._attempts}"
        manifest = {"format": FORMAT, "step": step, "world_size": self._world, "state": json.loads(json.dumps(state))}
        self._attempt = _Attempt(temporary, final, files, manifest, self._rank, self._keep, self._keep_every)

    def settle(self) -> str | None:
        """Wait for what was begun; why it failed, on every rank, or None. Collective.

        Raises RuntimeError, on every rank, for an error that no file system makes.
        """
        if self._attempt is None:
            return None
        attempt, self._attempt = self._attempt, None
        attempt.written.wait()
        problem = next(filter(None, _gathered(attempt.problem)), None)
        (attempt.abandoned if problem else attempt.all_written).set()
        attempt.thread.join()
        ended = _gathered(attempt.problem)[0]  # only rank 0 knows, when all have written
        problem = problem or ended
        if problem and self._rank == 0:
            remove_leftovers(self._folder)
        if any(_gathered(attempt.wrong)):
            raise RuntimeError(f"a checkpoint can't be written: {problem}")
        return problem

    def join(self, seconds: float) -> None:
        """Where the process must end and nothing can be agreed on: give what is being written that much time."""
        if self._attempt is not None:
            self._attempt.thread.join(seconds)


class _Attempt:
    """One rank's part of writing one checkpoint."""

    def __init__(
        self,
        temporary: Path,
        final: Path,
        files: dict[str, dict[str, Tensor]],
        manifest: dict[str, Any],
        rank: int,
        keep: int,
        keep_every: int,
    ) -> None:
        self._temporary, self._final, self._files, self._manifest = temporary, final, files, manifest
        self._rank, self._keep, self._keep_every = rank, keep, keep_every
        self.problem: str | None = None
        self.wrong = False  # an error of ours, which trying again won't mend
        self.written, self.all_written, self.abandoned = (threading.Event() for _ in range(3))
        self.thread = threading.Thread(target=self._run, name="v4train-checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._write()
            self.written.set()
            if self._rank == 0:
                self._complete()
        except BaseException as error:  # safetensors has classes of its own; others would wait for ever
            self.problem = f"rank {self._rank}: {' '.join(str(error).split())}"
            self.wrong = not isinstance(error, (OSError, SafetensorError))
        finally:
            self._files.clear()
            self.written.set()
            if self._rank == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)

    def _write(self) -> None:
        self._temporary.mkdir(parents=True, exist_ok=True)
        digests = {}
        for stem in list(self._files):
            path = self._temporary / f"{stem}.safetensors"
            save_file(self._files.pop(stem), path)
            digests[path.name] = durable.sync_file(path)
        durable.replace(self._temporary / _part(self._rank), json.dumps(digests).encode())

    def _complete(self) -> None:
        parts = [self._temporary / _part(rank) for rank in range(self._manifest["world_size"])]
        late = None
        missing = list(parts)
        while missing := [part for part in missing if not part.exists()]:
            if self.abandoned.wait(POLL):
                return
            if self.all_written.is_set():
                late = late or time.monotonic() + LATE
                if time.monotonic() > late:
                    raise OSError("what other ranks have written can't be seen: is it one file system for all?")
        digests: dict[str, str] = {}
        for part in parts:
            digests |= json.loads(part.read_bytes())
            part.unlink()
        manifest = self._manifest | {"files": digests}
        durable.replace(self._temporary / MANIFEST, manifest_bytes(manifest))
        there = {path.name for path in self._temporary.iterdir()}
        if there != {*digests, MANIFEST}:
            raise OSError(f"files have vanished: {', '.join(sorted({*digests, MANIFEST} ^ there))}")
        replaced = self._temporary.with_name(f"{self._temporary.name}{REPLACED}")
        if self._final.exists():  # of the same step: this run went back before it
            os.rename(self._final, replaced)
        os.rename(self._temporary, self._final)
        with durable.optional(self._final):  # it is there: what fails now is no reason to write it again
            durable.sync_folder(self._final.parent)
            shutil.rmtree(replaced, ignore_errors=True)
            prune(self._final.parent, self._manifest["step"], self._keep, self._keep_every)


def save(
    folder: Path,
    step: int,
    parameters: Parameters,
    buffers: dict[str, Tensor],
    state: dict[str, Any],
    keep: int = 0,
) -> Path:
    """Write one checkpoint and wait for it; returns its folder. Collective. Raises OSError where it can't."""
    writer = CheckpointWriter(folder, keep)
    writer.start(step, parameters, buffers, state)
    if problem := writer.settle():
        raise OSError(problem)
    return folder / f"step_{step:08d}"


def _part(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _gathered(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
