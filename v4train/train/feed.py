"""What the ranks train on, as far as they have to agree about it: each has a loader of its own rows."""

from typing import Any

from v4train.data import Batch, EndOfData, Loader, merged_states
from v4train.errors import ConfigError
from v4train.parallel.topology import Topology
from v4train.train.distributed import all_max, gathered


class Feed:
    """Of one run, on every rank; every rank calls the same methods at the same steps."""

    def __init__(self, loader: Loader, topology: Topology) -> None:
        self._loader, self._topology = loader, topology
        # Of the ranks that have the same rows one counts them
        self._counts = not any(topology.index(axis) for axis in ("tensor", "context", "pipeline"))

    def next_batches(self) -> list[Batch] | None:
        """This rank's shards of its micro-batches, on its device; None on every rank where one's data have ended.

        Bad data that one rank has met are every rank's error (ConfigError).
        """
        problem, batches = None, []
        try:
            batches = self._loader.next_step()
        except (EndOfData, ConfigError) as error:
            problem = error
        if not all_max(float(problem is not None), self._topology.device):
            index, count = self._topology.index("context"), self._topology.sizes.context
            return [batch.shard(index, count, self._topology.device) for batch in batches]
        errors = [error for error in gathered(problem) if isinstance(error, ConfigError)]
        if errors:
            raise errors[0]
        if problem is None:
            self._loader.take_back()
        return None

    def own_counts(self) -> dict[str, float]:
        """This rank's share of the last step's figures, to be summed over all."""
        return {name: count * self._counts for name, count in self._loader.counts.items()}

    def epochs(self) -> float | dict[str, float]:
        """How often the data have been read; of several sources by name."""
        epochs = self._loader.epochs()
        return epochs if len(epochs) > 1 else next(iter(epochs.values()), 0.0)

    def state(self) -> dict[str, Any]:
        """The position of all ranks together."""
        return merged_states(gathered(self._loader.state_dict()))

    def left_out(self) -> list[str]:
        """Bad data that were left out, over all ranks and this run's restarts: a line for each source."""
        return [
            f"data left out of {source}: " + ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in kinds.items())
            for source, kinds in self.state()["left_out"].items()
            if kinds
        ]
