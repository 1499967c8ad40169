"""Which optimizer holds which parameter (V4 report 2.4): Muon for matrices, AdamW for the rest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from v4train.optim.config import OptimizerConfig


@dataclass
class ParameterGroup:
    """Parameters, by canonical name, that share an optimizer and a learning rate.

    Nothing here holds a number of elements: ZeRO 3 empties the parameters.
    """

    name: str  # unique, e.g. "muon", "muon_rows_4_4_16", "muon_heads_64", "adamw_indexer"
    use_muon: bool
    rows: tuple[int, ...] | int | None  # Muon: of the matrices stacked along the rows (optim.muon.Matrices)
    joined: bool  # Muon: the dimension before the matrix is rows too
    indexer: bool  # parameters of lightning indexers, which some phases train alone or freeze
    parts: tuple[tuple[str, int], ...]  # (axis, dimension counted from the end) along which ranks have parts of each
    parameters: dict[str, nn.Parameter]

    def is_part(self, axis: str) -> bool:
        """Whether ranks along this axis have parts of each parameter, and not all of it."""
        return any(axis == name for name, _ in self.parts)


def is_muon_parameter(name: str, parameter: nn.Parameter) -> bool:
    """A matrix or a stack of matrices, but no embedding, output head or (position) bias."""
    return parameter.ndim >= 2 and "embed" not in name and "lm_head" not in name and not name.endswith("bias")


COPIED = "copied_from_another_stage"  # attribute of a parameter whose weights are another stage's to train
Parts = Mapping[str, tuple[tuple[str, int], ...]]


def param_groups(
    model: nn.Module,
    config: OptimizerConfig,
    parts: Parts = MappingProxyType({}),
) -> list[ParameterGroup]:
    """Split the model's parameters: one group for each optimizer, way to see matrices in a tensor, indexer or not, and
    how ranks share the parameter out (`parts`, by name, as in `ParameterGroup`). Parameters on meta are other ranks'.

    What of a tensor is one matrix, modules note on their parameters: `independent_rows` are always matrices of their
    own; `head_rows` (rows of each head) are with `config.per_head`; the leading dimension of `grouped` ones counts
    matrices with `config.per_group`, else their rows are joined.

    Raises ValueError for a parameter without gradient (freeze groups with `Engine.freeze`: a state that exists on every
    parameter is what makes phases and checkpoints simple) and for rows that do not fit the shape.
    """
    groups: dict[str, ParameterGroup] = {}
    for name, parameter in local_parameters(model):
        if not parameter.requires_grad:
            raise ValueError(f"{name} does not require a gradient; freeze its group with Engine.freeze instead")
        use_muon = config.name == "muon" and is_muon_parameter(name, parameter)
        rows = _rows(name, parameter, config.per_head) if use_muon else None
        joined = use_muon and getattr(parameter, "grouped", False) and not config.per_group
        indexer = "indexer" in name
        words = ["muon" if use_muon else "adamw"]
        words += ["heads", str(rows)] if isinstance(rows, int) else ["rows", *map(str, rows)] if rows else []
        words += ["joined"] if joined else []
        words += ["indexer"] if indexer else []
        words += [f"{axis}{dim}" for axis, dim in parts.get(name, ())]
        key = "_".join(words)
        group = groups.setdefault(key, ParameterGroup(key, use_muon, rows, joined, indexer, parts.get(name, ()), {}))
        group.parameters[name] = parameter
    return list(groups.values())


def parameter_counts(model: nn.Module, groups: list[ParameterGroup], config: OptimizerConfig) -> dict[str, int]:
    """Number of elements each optimizer holds, e.g. {"muon": 9_000_000, "adamw": 400_000}, for the start-up print.

    Call it before ZeRO 3 empties the parameters. Raises ValueError when a parameter is in no group or in two, or when
    a matrix that is Muon's is not with Muon.
    """
    held = [(name, group.use_muon) for group in groups for name in group.parameters]
    parameters = dict(local_parameters(model))
    if sorted(name for name, _ in held) != sorted(parameters):
        missed = set(parameters) ^ {name for name, _ in held}
        raise ValueError(f"every parameter must be in exactly one group; look at {sorted(missed) or 'duplicates'}")
    use_muon = dict(held)
    counts = {"muon": 0, "adamw": 0} if config.name == "muon" else {"adamw": 0}
    for name, parameter in parameters.items():
        if config.name == "muon" and use_muon[name] != is_muon_parameter(name, parameter):
            wrong, right = ("Muon", "AdamW") if use_muon[name] else ("AdamW", "Muon")
            raise ValueError(f"{name} {list(parameter.shape)} is held by {wrong} but belongs to {right}")
        counts["muon" if use_muon[name] else "adamw"] += parameter.numel()
    return counts


def local_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained on this rank.

    Other pipeline stages' are on meta, or `copied` from there.
    """
    every = model.named_parameters()
    return ((name, parameter) for name, parameter in every if not parameter.is_meta and not hasattr(parameter, COPIED))


def _rows(name: str, parameter: nn.Parameter, per_head: bool) -> tuple[int, ...] | int | None:
    rows, of_head = getattr(parameter, "independent_rows", None), getattr(parameter, "head_rows", None)
    if rows is not None and sum(rows) != parameter.shape[-2]:
        raise ValueError(f"{name}: independent_rows {tuple(rows)} do not sum to the {parameter.shape[-2]} rows")
    if of_head is not None and parameter.shape[-2] % of_head:
        raise ValueError(f"{name}: heads of {of_head} rows do not divide the {parameter.shape[-2]} rows")
    if rows is not None:
        return tuple(int(size) for size in rows)
    return of_head if per_head else None
