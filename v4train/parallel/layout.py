"""A layout applied to a model from outside: which tensors are shared out, and which seams take the model's places.

The model comes on the meta device. `Layout` makes its parameters those of this rank; `materialise` gives them the
values that one process would have (DESIGN 7): each whole tensor is a function of its name, then cut.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from v4train.model import Transformer
from v4train.model.attention.dsa import TokenIndexer
from v4train.model.attention.gqa import GroupedQueryAttention
from v4train.model.attention.indexer import Indexer
from v4train.model.attention.mla import MultiHeadLatentAttention
from v4train.model.attention.shared_kv import SharedKVAttention
from v4train.model.embedding import Lookup
from v4train.model.ffn import SwiGLU
from v4train.model.head import LMHead
from v4train.model.init import initial_value
from v4train.model.moe.experts import Experts
from v4train.model.seams import Seams, put_seams
from v4train.model.seams import Sequence as WholeRows
from v4train.optim.param_groups import COPIED
from v4train.parallel.context import Shards
from v4train.parallel.expert import SharedOutExperts
from v4train.parallel.groups import process_groups
from v4train.parallel.slices import Box
from v4train.parallel.stages import Stages
from v4train.parallel.tensor import SharedOutHeads, SharedOutVocabulary
from v4train.parallel.topology import Topology

# Dimension that tensor parallelism cuts, by the module that owns the parameter. What isn't named is whole everywhere.
HEADS: dict[type[nn.Module], dict[str, int]] = {
    SharedKVAttention: {"query_up.weight": 0, "sink": 0, "output_down.weight": 0, "output_up.weight": 1},
    Indexer: {"query.weight": 0, "head_weight.weight": 0},
    TokenIndexer: {"query.weight": 0, "head_weight.weight": 0},
    MultiHeadLatentAttention: {
        "query_up.weight": 0,
        "key_up.weight": 0,
        "value_up.weight": 0,
        "output.weight": 1,
        "sink": 0,
    },
    GroupedQueryAttention: {"query.weight": 0, "query.bias": 0, "output.weight": 1, "sink": 0},
    SwiGLU: {"gate_up.weight": 1, "down.weight": 1},
    Experts: {"gate_up": 2, "gate_up_bias": 2, "down": 2, "down_bias": 1},
    Lookup: {"weight": 0},
    LMHead: {"weight": 0},
}
KEY_VALUE = {"key.weight": 0, "key.bias": 0, "value.weight": 0, "value.bias": 0}  # of GQA, where there are enough heads


@dataclass(frozen=True)
class Cut:
    """A tensor is cut into `count` equal parts along `dim`, one for each rank along an axis; this is part `index`."""

    axis: str  # `tensor` or `expert`
    dim: int
    index: int
    count: int

    def of(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.count, self.dim)[self.index]


class Layout:
    """What this rank holds of a model, by canonical name.

    Attributes:
        shapes: of every whole parameter and buffer of the model.
        cuts: of the tensors that are shared out; the others are whole.
        names: the parameters that are here; the others are on other pipeline stages.
        stages: the pipeline's, None where there is one only.
    """

    def __init__(self, model: Transformer, topology: Topology, sequence_length: int) -> None:
        """model: on meta; its parameters become those of this rank. sequence_length: that stages are balanced for."""
        self.topology, self.groups, self.config = topology, process_groups(topology), model.config
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.shapes = {name: tensor.shape for name, tensor in tensors}
        self.cuts = {name: cuts for name, _ in tensors if (cuts := self._cuts(model, name))}
        for name, cuts in self.cuts.items():
            whole = model.get_parameter(name)
            for cut in cuts:
                whole = cut.of(whole)
            _put(model, name, torch.empty(whole.shape, device="meta"))
        model.tie()
        self._seams = self._make_seams()
        put_seams(model, self._seams)
        self.stages = Stages(model, topology, sequence_length) if topology.sizes.pipeline > 1 else None
        modules = [model] if self.stages is None else self.stages.here
        here = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
        self.names = [name for name, parameter in model.named_parameters() if id(parameter) in here]
        self._buffers = [name for name, buffer in model.named_buffers() if id(buffer) in here]

    @torch.no_grad()
    def materialise(self, model: Transformer) -> None:
        """Give this rank's tensors their values, one whole tensor at a time."""
        for name in [*self.names, *self._buffers]:
            _put(model, name, self.initial(name).to(self.topology.device))
        model.tie()
        if self.stages is not None and self.stages.copies_embedding:
            for parameter in model.embedding.parameters():
                setattr(parameter, COPIED, True)

    def initial(self, name: str) -> Tensor:
        """This rank's part of a tensor's initial value; of a stack of experts no other is made."""
        shape, first, cuts = list(self.shapes[name]), 0, self.cuts.get(name, ())
        if cuts and cuts[0].axis == "expert":
            shape[0] //= cuts[0].count
            first, cuts = cuts[0].index * shape[0], cuts[1:]
        return _cut(initial_value(name, torch.Size(shape), self.config, first), cuts)

    def box(self, name: str) -> Box:
        """Where in the whole parameter the part lies that is here."""
        sides = [slice(0, size) for size in self.shapes[name]]
        for cut in self.cuts.get(name, ()):
            side = sides[cut.dim]
            size = (side.stop - side.start) // cut.count
            sides[cut.dim] = slice(side.start + cut.index * size, side.start + (cut.index + 1) * size)
        return tuple(sides)

    def _cuts(self, model: Transformer, name: str) -> tuple[Cut, ...]:
        """Experts first, then heads or channels."""
        sizes, found = self.topology.sizes, []
        path = name.split(".")
        for depth in range(len(path)):
            module, leaf = model.get_submodule(".".join(path[:depth])), ".".join(path[depth:])
            if sizes.expert > 1 and isinstance(module, Experts):
                found.append(Cut("expert", 0, self.topology.index("expert"), sizes.expert))
            dim = next((dims[leaf] for kind, dims in HEADS.items() if isinstance(module, kind) and leaf in dims), None)
            if isinstance(module, GroupedQueryAttention) and not module.shares_kv(sizes.tensor):
                dim = KEY_VALUE.get(leaf, dim)
            if sizes.tensor > 1 and dim is not None:
                found.append(Cut("tensor", dim, self.topology.index("tensor"), sizes.tensor))
        return tuple(found)

    @contextmanager
    def whole_rows(self, model: Transformer) -> Iterator[None]:
        """Inside, every rank's rows are whole, not shards of longer ones."""
        put_seams(model, replace(self._seams, sequence=WholeRows()))
        try:
            yield
        finally:
            put_seams(model, self._seams)

    def _make_seams(self) -> Seams:
        sizes, groups, seams = self.topology.sizes, self.groups, Seams()
        if sizes.tensor > 1:
            seams.heads, seams.vocabulary = SharedOutHeads(groups["tensor"]), SharedOutVocabulary(groups["tensor"])
        if sizes.context > 1:
            seams.sequence = Shards(groups["context"])
        if sizes.expert > 1:
            seams.experts = SharedOutExperts(groups["expert"])
        return seams


def _cut(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    for cut in cuts:
        tensor = cut.of(tensor)
    return tensor.clone(memory_format=torch.contiguous_format) if cuts else tensor.contiguous()  # not a view of it all


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """A parameter's or buffer's new tensor; what is noted on a parameter stays."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
        return
    old = module._parameters[leaf]
    module._parameters[leaf] = new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
