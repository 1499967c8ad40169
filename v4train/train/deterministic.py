"""`train.deterministic`: the same bits every time, also on a GPU, where sums in any order are faster."""

import os

import torch


def make_deterministic() -> None:
    """For the whole process, before it uses a GPU. An operation that can't be deterministic raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts; torch insists on it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it would choose by measuring
    torch.utils.deterministic.fill_uninitialized_memory = False  # finds bugs, and writes every buffer twice
