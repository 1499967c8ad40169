"""The page: final figures, pictures, samples, differences and configuration in one HTML file without scripts."""

import base64
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import OmegaConf

from v4train import durable
from v4train.report.groups import Group, group_figures
from v4train.report.runs import Run
from v4train.terminal import format_duration
from v4train.train.step_times import PARTS

PAGE = "index.html"


class Shown(NamedTuple):
    """A picture on the page."""

    title: str
    caption: str
    path: Path


def write_page(
    out: Path,
    runs: list[Run],
    shown: list[Shown],
    different: dict[str, list[Any]] | None = None,
    groups: Sequence[Group] = (),
) -> Path:
    """Write `out`/index.html and return its path. different: from `differences`, on a page of several runs; groups:
    these runs by `groups_of`."""
    environment = Environment(
        loader=PackageLoader("v4train.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    figures = [final_figures(run) for run in runs]
    names = list(dict.fromkeys(name for of in figures for name in of))
    of_groups = group_figures(groups)
    pictures = [(of.title, of.caption, base64.b64encode(of.path.read_bytes()).decode()) for of in shown]
    text = environment.get_template("page.html").render(
        title=runs[0].name if different is None else f"{len(runs)} run{'s' * (len(runs) > 1)}",
        model=runs[0].config["model"].get("name", "") if different is None else "",
        runs=runs,
        names=names,
        figures=figures,
        groups=list(zip([group.name for group in groups], of_groups, strict=True)),
        group_names=list(dict.fromkeys(name for of in of_groups for name in of)),
        best=_best(runs) if len(runs) > 1 else None,
        pictures=pictures,
        different=different,
        configuration=None if different is not None else OmegaConf.to_yaml(OmegaConf.create(runs[0].config)),
    )
    path = out / PAGE
    durable.replace(path, text.encode())
    return path


def final_figures(run: Run) -> dict[str, str]:
    """What the run came to, in words by name; what it has not got is left out."""
    found = {}
    if run.validations:
        last = run.validations[-1]
        found["validation loss (nats/token)"] = f"{last['val_loss']:.4f}"
        for key, name in (("val_bits_per_byte", "bits/byte"), ("val_gain_over_unigram", "below unigram entropy")):
            if key in last:
                found[name] = f"{last[key]:.4f}"
    if not run.steps:
        return found | {"steps": "0"}
    last = run.steps[-1]
    found["training loss"] = f"{last.get('lm_loss', last['loss']):.4f}"
    if run.diverged:
        found["loss not finite"] = f"in {len(run.diverged):,} of {len(run.steps):,} steps, first in {run.diverged[0]:,}"
    found["steps"] = f"{last['step']:,}"
    if (tokens := run.last("tokens")) is not None:
        found["tokens"] = f"{tokens:,}"
    found["time in steps"] = format_duration(3600 * float(run.clock[1][-1]))
    for key, name, form in (
        ("tokens_per_second", "tokens/s (median)", "{:,.0f}"),
        ("mfu", "MFU (median)", "{:.1%}"),
    ):
        values = run.curve(key)[1]
        if len(values):
            found[name] = form.format(np.median(values))
    memory = run.curve("memory_gib")[1]
    if len(memory):
        found["peak memory (GiB)"] = f"{memory.max():.2f}"
    found["updates skipped"] = f"{sum(bool(record.get('skipped')) for record in run.steps):,}"
    if back := sum(event["event"] == "went back" for event in run.incidents):
        found["spikes gone back for"] = f"{back:,}"
    if parts := mean_shares(run):
        found["time of a step"] = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
    slowest = Counter(record["slowest_rank"] for record in run.steps if record.get("slowest_rank") is not None)
    if slowest:
        (rank, times), total = slowest.most_common(1)[0], sum(slowest.values())
        found["slowest rank"] = f"{rank} ({times / total:.0%} of steps)"
    return found


def mean_shares(run: Run) -> dict[str, float]:
    """Share of each part in the time of all steps; nothing where that is not known."""
    timed = [record for record in run.steps if all(f"{part}_seconds" in record for part in ("step", *PARTS))]
    total = sum(record["step_seconds"] for record in timed)
    return {part: sum(record[f"{part}_seconds"] for record in timed) / total for part in PARTS} if total else {}


def _best(runs: list[Run]) -> int | None:
    """Which run has the lowest last validation loss."""
    losses = [run.validations[-1]["val_loss"] if run.validations else np.nan for run in runs]
    return int(np.nanargmin(losses)) if np.isfinite(losses).any() else None
