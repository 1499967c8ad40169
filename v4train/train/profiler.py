"""`train.profile=[start,stop]`: a torch.profiler run over optimizer steps start..stop-1, by operator and by module.

<run dir>/profile/  modules.txt  modules.json  operators.txt  trace_steps_<start>_<stop>.json (for ui.perfetto.dev)
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from v4train import durable
from v4train.model.losses import in_backward
from v4train.train.module_times import GRADIENTS, MODEL, STEP, SequenceOwners, as_rows, as_table, module_times

DEPTH = 4  # components of a module's path (blocks.2.ffn.experts); what lies deeper counts for the module around it
LARGE = 100_000  # events from which the trace is compressed: some 30 MB of JSON

logger = logging.getLogger("v4train")


class ModuleLabels:
    """Labels each module's forward pass in a profile, and notes which module makes which autograd node.

    A module called from elsewhere in the tree stands under its caller: MTP's use of the head is mtp.head.lm_head.
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths = {MODEL}
        self.owners = SequenceOwners()
        self._running: list[tuple[str, record_function]] = []
        self._handles = []
        for name, module in model.named_modules():
            if name.count(".") < DEPTH:
                # Around the hooks that are there already: gathering a sharded parameter counts for its module
                enter, leave = partial(self._enter, name or MODEL), self._leave
                self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
                self._handles.append(module.register_forward_hook(leave))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, *_: Any) -> None:
        caller = self._running[-1][0] if self._running else MODEL
        path = name if caller in (MODEL, name) or name.startswith(f"{caller}.") else f"{caller}.{name}"
        self.paths.add(path)
        label = record_function(path)
        label.__enter__()
        self._running.append((path, label))
        self._note_owner()

    def _leave(self, *_: Any) -> None:
        _, label = self._running.pop()
        label.__exit__(None, None, None)
        self._note_owner()

    def _note_owner(self) -> None:
        if not in_backward():  # nodes made there are those of recomputation, which never run
            path = self._running[-1][0] if self._running else MODEL
            self.owners.change(torch._C._autograd._get_sequence_nr(), path)


class StepProfiler:
    """Profiles the steps that `steps` = [start, stop) names, 1-based; None profiles nothing.

    Context manager around the whole run, `step` around each of its steps. Hooks exist while it profiles only; results
    don't change.

    Args:
        folder: where the results go; made when there are some.
        parts: methods that get a row of their own, (object, name of the method) by the row's name.
    """

    def __init__(
        self, steps: list[int] | None, folder: Path, model: nn.Module, parts: Mapping[str, tuple[Any, str]]
    ) -> None:
        self.steps, self.folder, self.model, self.parts = steps, folder, model, parts
        self._profile: profile | None = None
        self._done = 0

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """A run that ends early leaves the profile of the steps it got to, unless it failed."""
        if self._profile is not None:
            self._stop()
            if kind is None:
                self._write()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around optimizer step `number`."""
        if self.steps is None or not self.steps[0] <= number < self.steps[1]:
            yield
            return
        if self._profile is None:
            self._start()
        with record_function(STEP):
            yield
        self._done += 1
        if number == self.steps[1] - 1:
            self._stop()
            self._write()
            self._profile = None

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13's profiler writes its own lines to stderr
        self._on_device = next(self.model.parameters()).device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_device else [])]
        self._installed = ExitStack()
        self._labels = ModuleLabels(self.model)
        self._installed.callback(self._labels.remove)
        for label, (owner, method) in self.parts.items():
            self._installed.enter_context(_labelled(owner, method, label))
        self._profile = profile(activities=activities)
        self._profile.start()

    def _stop(self) -> None:
        self._profile.stop()
        self._installed.close()

    def _write(self) -> None:
        with durable.optional(self.folder):
            self._write_files()

    def _write_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        events, labels = self._profile.events(), self._labels
        known = {STEP, GRADIENTS, *self.parts, *labels.paths}
        rows = as_rows(module_times(events, known, labels.paths, labels.owners, self._on_device), self._done)
        kind = "CUDA" if self._on_device else "CPU"
        head = f"Steps {self.steps[0]} to {self.steps[0] + self._done - 1}, {kind} time; profiling itself slows them."
        (self.folder / "modules.txt").write_text(f"{head}\n\n{as_table(rows)}", encoding="utf-8")
        result = {"steps": self.steps, "profiled_steps": self._done, "time": kind, "unit": "ms a step", "rows": rows}
        (self.folder / "modules.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        averages = self._profile.key_averages()
        averages[:] = [average for average in averages if average.key not in known]
        by = "self_device_time_total" if self._on_device else "self_cpu_time_total"
        operators = averages.table(sort_by=by, row_limit=100, max_name_column_width=80)
        (self.folder / "operators.txt").write_text(operators, encoding="utf-8")
        suffix = ".json.gz" if len(events) >= LARGE else ".json"
        self._profile.export_chrome_trace(str(self.folder / f"trace_steps_{self.steps[0]}_{self.steps[1]}{suffix}"))
        logger.info("profile of steps %d to %d: %s", self.steps[0], self.steps[0] + self._done - 1, self.folder)


@contextmanager
def _labelled(owner: Any, method: str, label: str) -> Iterator[None]:
    """Inside, calls of that method stand under `label` in a profile."""
    original: Callable = getattr(owner, method)

    @wraps(original)
    def labelled(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return original(*args, **kwargs)

    setattr(owner, method, labelled)
    try:
        yield
    finally:
        delattr(owner, method)  # the class's own shows again
