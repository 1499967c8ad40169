"""What the server of lives.py imports before it forks: all that takes seconds."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # as a run sets it before DeepSpeed is imported

import deepspeed  # noqa: E402, F401

import tests.faults.lives  # noqa: E402, F401
import v4train.train.pretrain  # noqa: E402, F401
