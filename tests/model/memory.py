"""How large the tensors are that a computation makes and keeps."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator made, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


class LiveBytes(TorchDispatchMode):
    """Bytes of what operators made and is still alive, whoever holds it."""

    def __init__(self):
        super().__init__()
        self.made = {}  # weak references by address; a new storage takes the place of a dead one

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage)
        return made

    def count(self, besides):
        """besides: tensors that were there before; their views don't count."""
        before = {tensor.untyped_storage()._cdata for tensor in besides}
        others = (reference.cdata for key, reference in self.made.items() if key not in before)
        alive = filter(None, map(torch.UntypedStorage._new_with_weak_ptr, others))
        return sum(storage.nbytes() for storage in alive)  # as large as it is now: some have been emptied
