"""Ranks that write checkpoints together, and a disk that is full for one of them. Argument: a folder."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.launch import finished
from v4train.train import checkpoint_writer
from v4train.train.checkpoint_writer import CheckpointWriter


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, save_file, problems = dist.get_rank(), checkpoint_writer.save_file, {}

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    for stages in (1, 2):
        writer = CheckpointWriter(folder / f"stages_{stages}")
        per_stage = dist.get_world_size() // stages
        stage, number = divmod(rank, per_stage)
        for step, failing in enumerate((None, 1, 0, None), 1):
            checkpoint_writer.save_file = full if failing == rank else save_file
            names = [f"stage_{stage}.{i}" for i in range(number, 5, per_stage)]
            parameters = [("weight", name, torch.full((2,), float(step))) for name in names]
            buffers = {} if number else {f"stage_{stage}.bias": torch.tensor([step])}
            writer.start(step, parameters, buffers, {"rank": rank})
            dist.barrier()  # as the next training step does, while the threads write
            problems[f"{stages}.{step}"] = writer.settle()
    (folder / f"problems_{rank}.json").write_text(json.dumps(problems))
    dist.barrier()
    finished(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
