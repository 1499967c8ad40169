"""The state of an engine in one piece, whatever its layout."""

from collections import defaultdict

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from v4train.parallel.slices import Slice, assembled


def whole_state(engine: object) -> dict[str, dict[str, Tensor]]:
    """Name -> kind -> whole tensor, from what all ranks would save; every rank takes part."""
    of_ranks = [None] * torch.distributed.get_world_size()
    local = list(engine.local_state())
    for of in {kind for kind, _, _ in local}:
        serialize({key: tensor for kind, key, tensor in local if kind == of})  # it refuses tensors that share memory
    torch.distributed.all_gather_object(of_ranks, local)
    pieces: dict[tuple[str, str], list[tuple[Slice | None, Tensor]]] = defaultdict(list)
    for kind, key, tensor in (item for items in of_ranks for item in items):
        piece = Slice.of_key(key)
        pieces[piece.name if piece else key, kind].append((piece, tensor))
    state: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (name, kind), parts in sorted(pieces.items(), key=lambda item: item[0]):
        assert all(piece for piece, _ in parts) or len(parts) == 1, (name, kind)  # each value once
        state[name][kind] = assembled(parts) if parts[0][0] else parts[0][1]
    return dict(state)
