"""Time by module, from a profile: what each module's forward pass, its recomputation and its backward pass took.

A forward pass stands in the profile under the label of its module. A backward node has none, but it carries the
sequence number that autograd gave it when the forward pass made it, and the profiler has noted which module ran then.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

MODEL, STEP, GRADIENTS = "model", "step", "gradients"
BACKWARD_NODE = 1  # at::RecordScope::BACKWARD_FUNCTION, as `FunctionEvent.scope` has it
FORWARD, RECOMPUTE, BACKWARD, OTHER = PHASES = ("forward", "recompute", "backward", "other")


class SequenceOwners:
    """Which module made the autograd node of a sequence number. Numbers only grow."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._paths: list[str] = []

    def change(self, number: int, path: str) -> None:
        """Nodes from `number` on are made by `path`."""
        self._numbers.append(number)
        self._paths.append(path)

    def __getitem__(self, number: int) -> str:
        position = bisect_right(self._numbers, number)
        return self._paths[position - 1] if position else MODEL


@dataclass
class Times:
    """Of one module or other part, in microseconds over all profiled steps; `own` is without the parts inside it."""

    is_module: bool
    calls: int = 0
    own: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    total: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


def module_times(
    events: Iterable[FunctionEvent], labels: set[str], modules: set[str], owners: SequenceOwners, on_device: bool
) -> dict[str, Times]:
    """Times by path: of modules (`model` is the whole one), of other labels, and of `step`, which contains all.

    Args:
        events: of a `torch.profiler` run in which every step stands under the label `step`.
        labels: names of the annotations to tell apart; those of `modules` are modules.
        on_device: count the accelerator's time, not the CPU's.
    """
    times: dict[str, Times] = {}
    events = [event for event in events if event.device_type == DeviceType.CPU]
    steps = [event.time_range for event in events if event.name == STEP and event.is_user_annotation]

    def part(path: str) -> Times:
        return times.setdefault(path, Times(path in modules))

    def visit(event: FunctionEvent, path: str, phase: str) -> Iterator[tuple[FunctionEvent, str, str]]:
        if event.is_user_annotation and event.name in labels:
            path = event.name
            if path not in modules:
                phase = OTHER
            else:
                phase = RECOMPUTE if phase in (BACKWARD, RECOMPUTE) else FORWARD
            part(path).calls += phase != RECOMPUTE
        elif event.scope == BACKWARD_NODE and phase != RECOMPUTE:
            # The nodes that add up a parameter's gradient (and, by hooks, reduce it) have no number
            path, phase = (owners[event.sequence_nr], BACKWARD) if event.sequence_nr >= 0 else (GRADIENTS, OTHER)
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        part(path).own[phase] += own
        return ((child, path, phase) for child in event.cpu_children)

    # Roots other than the steps themselves: an accelerator's backward pass runs in a thread of its own
    waiting = [(event, STEP, OTHER) for event in events if event.cpu_parent is None and _inside(event, steps)]
    while waiting:
        waiting += visit(*waiting.pop())
    _add_totals(times)
    return times


def _inside(event: FunctionEvent, ranges: list[Any]) -> bool:
    return any(known.start <= event.time_range.start <= known.end for known in ranges)


def _add_totals(times: dict[str, Times]) -> None:
    for path, part in list(times.items()):
        for ancestor in {path, *_ancestors(path, part.is_module)}:
            total = times.setdefault(ancestor, Times(part.is_module and ancestor != STEP)).total
            for phase in PHASES:
                total[phase] += part.own[phase]


def _ancestors(path: str, is_module: bool) -> list[str]:
    """What contains a path: `a.b.c` lies in a.b, a, the model and the step."""
    if not is_module:
        return [STEP]
    parts = path.split(".")
    return [STEP, MODEL, *(".".join(parts[:end]) for end in range(1, len(parts)))]


def as_rows(times: dict[str, Times], num_steps: int) -> list[dict[str, Any]]:
    """Milliseconds of one step by path and phase; `share` is a part of the whole step. The modules last."""
    whole = sum(times[STEP].total.values())

    def row(path: str, part: Times) -> dict[str, Any]:
        columns = {"module": path, "calls": part.calls / num_steps}
        for phase in PHASES[:3]:
            columns[f"{phase}_self"] = round(part.own[phase] / 1000 / num_steps, 4)
            columns[f"{phase}_total"] = round(part.total[phase] / 1000 / num_steps, 4)
        columns["self"] = round(sum(part.own.values()) / 1000 / num_steps, 4)
        columns["total"] = round(sum(part.total.values()) / 1000 / num_steps, 4)
        return columns | {"share": round(sum(part.total.values()) / max(whole, 1e-9), 5)}

    def place(path: str) -> tuple:  # the step, its other parts, the model, its modules (block 2 before block 10)
        numbers = [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]
        return path != STEP, times[path].is_module, path != MODEL, numbers

    return [row(path, times[path]) for path in sorted(times, key=place)]


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text, without columns that hold nothing."""
    numbers = [key for key in rows[0] if key not in ("module", "calls", "share") and any(row[key] for row in rows)]
    width = max(len(row["module"]) for row in rows) + 2
    lines = [f"{'ms a step':<{width}}{'calls':>7}" + "".join(f"{key:>17}" for key in numbers) + f"{'share':>9}"]
    for row in rows:
        cells = "".join(f"{row[key]:>17.3f}" if row[key] else f"{'-':>17}" for key in numbers)
        lines.append(f"{row['module']:<{width}}{row['calls']:>7g}{cells}{row['share']:>8.2%}")
    return "\n".join(lines) + "\n"
