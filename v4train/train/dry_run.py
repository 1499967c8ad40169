"""`train.dry_run=true`: what a run would be, without a step of it: plan, memory, and statistics of its first batch.

Nothing is written but a tokenizer or corpus that the data cache lacks, and no weight is made: the layout is applied to
a model on the meta device, however large, and the figures are those of `analysis`.
"""

from dataclasses import replace

import torch
from omegaconf import OmegaConf

from v4train.analysis.flops import training_flops_per_token
from v4train.analysis.memory import GIB, Memory, stage_memory
from v4train.analysis.parameters import parameter_counts
from v4train.analysis.step_time import bubble_fraction, traffic_per_rank
from v4train.analysis.work import Work
from v4train.config import Settings
from v4train.data import Batch, BatchConfig, Loader
from v4train.estimation import read_layout
from v4train.model import build_model
from v4train.parallel.layout import Layout
from v4train.train.distributed import all_max, all_sum
from v4train.train.evaluation import find_data
from v4train.train.phases import Stage
from v4train.train.progress import setup_logging, start_table


def dry_run(settings: Settings) -> dict[str, float]:
    """Show it, on rank 0; every rank calls it. Returns the figures.

    Raises:
        ConfigError: the layout, the data or their tokenizer can't be what the run needs.
    """
    topology, train = settings.topology, settings.train
    setup_logging(None, topology.rank)
    given = read_layout(OmegaConf.create(settings.resolved), settings.model, topology.world_size)
    given = replace(given, device=topology.device.type)  # what `auto` is
    stage, work = max(works(settings, given), key=lambda of: fullest(settings, of[1]).total)
    with torch.device("meta"):
        model = build_model(settings.model)
    layout = Layout(model, topology, train.sequence_length)
    here = sum(model.get_parameter(name).numel() for name in layout.names)
    figures = {"parameters_of_fullest_rank": all_max(float(here), topology.device), **planned(settings, stage, work)}
    tokenizer, corpus, _ = find_data(settings)
    first = settings.plan.at(0)
    sizes = (first.global_batch_size, settings.micro_batch(first), topology.index("data"), topology.sizes.data)
    loader = Loader(corpus, settings.data, tokenizer, first.sequence_length, BatchConfig(*sizes), settings.seed)
    counts = not any(topology.index(axis) for axis in ("tensor", "context", "pipeline"))  # of ranks with the same rows
    try:
        own = batch_statistics(loader.next_step())
    finally:
        loader.close()
    figures |= all_sum({name: count * counts for name, count in own.items()}, topology.device)
    if topology.rank == 0:
        start_table(rows(settings, work, figures), f"v4train: {settings.run.name}, dry run")
    return figures


def works(settings: Settings, given: Work) -> list[tuple[Stage, Work]]:
    """Of each phase and batch size that the run gets to: its first step, and `given` with its length, mode, batches."""
    found = []
    for stretch in settings.plan.stretches:
        if stretch.first >= settings.plan.total_steps:
            break
        stage = settings.plan.at(stretch.first)
        rows = settings.micro_batch(stage)
        accumulation = stage.global_batch_size // (rows * given.data)
        length, mode = stage.sequence_length, stage.attention_mode
        found.append((stage, replace(given, sequence_length=length, mode=mode, rows=rows, accumulation=accumulation)))
    return found


def fullest(settings: Settings, work: Work) -> Memory:
    """Bytes of the pipeline stage that holds most."""
    return max(stage_memory(settings.model, work), key=lambda of: of.total)


def planned(settings: Settings, stage: Stage, work: Work) -> dict[str, float]:
    """Of a step of `stage`, by formula: GiB of the fullest rank by what it holds, what a rank sends, FLOPs, bubble."""
    memory = fullest(settings, work)
    figures = {f"memory_gib/{name}": size / GIB for name, size in memory.parts.items()}
    figures |= {"memory_gib": memory.total / GIB, "bubble": bubble_fraction(work)}
    figures["traffic_gib"] = sum(traffic_per_rank(settings.model, work).values()) / GIB
    per_token = training_flops_per_token(settings.model, stage.sequence_length, stage.attention_mode)
    return figures | {"flops_per_step": per_token * stage.tokens}


def batch_statistics(batches: list[Batch]) -> dict[str, float]:
    """Of this rank's rows of a step: positions, padding, targets that count, documents."""
    counts = dict.fromkeys(("positions", "padding", "targets", "documents"), 0.0)
    for batch in batches:
        counts["positions"] += batch.input_ids.numel()
        counts["padding"] += int((batch.document_ids < 0).sum())
        counts["targets"] += int((batch.own_targets >= 0).sum())
        counts["documents"] += sum(len(row[row >= 0].unique()) for row in batch.document_ids)
    return counts


def rows(settings: Settings, work: Work, figures: dict[str, float]) -> list[tuple[str, str]]:
    total, active = parameter_counts(settings.model)
    parts = [(name.partition("/")[2], figures[name]) for name in figures if name.startswith("memory_gib/")]
    held = ", ".join(f"{name} {size:.3g}" for name, size in parts if size)
    batch = (
        f"{work.accumulation} x {work.rows} rows of {work.sequence_length:,} tokens on each of {work.data} data ranks"
    )
    plan, phases = settings.plan, settings.plan.lines()
    documents, positions, padding = (figures[name] for name in ("documents", "positions", "padding"))
    return [
        ("model", f"{settings.model.name}: {' '.join(settings.model.layer_kinds)}"),
        ("parameters", f"{total / 1e6:,.2f} M, of which {active / 1e6:,.2f} M active for a token"),
        ("layout", f"{work.world} ranks: {settings.topology.sizes}, ZeRO {work.zero_stage}, {settings.precision}"),
        ("fullest rank", f"{figures['parameters_of_fullest_rank'] / 1e6:,.2f} M parameters before ZeRO"),
        ("memory", f"{figures['memory_gib']:.3g} GiB on it, beside the process itself: {held}"),
        ("training", f"{plan.total_steps:,} steps of {batch}{' in the fullest phase' if len(phases) > 1 else ''}"),
        *(phases if len(phases) > 1 else []),
        ("step", f"{figures['flops_per_step'] / 1e12:,.4g} TFLOPs, {figures['traffic_gib']:.3g} GiB sent by a rank"),
        ("bubble", f"{figures['bubble']:.1%} of the pipeline's time"),
        (
            "first batch",
            f"{positions:,.0f} positions, {padding / positions:.2%} padding, {figures['targets']:,.0f} targets, "
            f"{documents:,.0f} documents of {(positions - padding) / max(documents, 1):,.0f} tokens",
        ),
    ]
