"""The folder of a run: start, continue or refuse what is there (DESIGN 11). Rank 0 writes, the others wait.

runs/<name>/  config.yaml  metrics.jsonl  events.jsonl  summary.json  checkpoints/  wandb/  report/  profile/
              samples.txt  log.txt
"""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from v4train import durable
from v4train.errors import ConfigError
from v4train.train import checkpoint

# Keys that a continued run must share with the run it continues: with others it would be another experiment.
BOUND = ("seed", "model", "data", "tokenizer.vocab_size", "tokenizer.path", "optimizer.name", "train.sequence_length")
ADDED = {"model.tie_embedding": False, "data.recall": None}  # keys that older checkpoints lack, and what they meant
_FREE_DATA = ("workers", "retries", "verify", "on_error", "weights")
# What changes speed, not results; and what may change from where a run continues on
FREE = ("model.attention.query_chunk", *(f"data.{key}" for key in _FREE_DATA))
BOOKKEEPING = re.compile(  # that no figure depends on
    r"run\.|tracking\.|checkpoint\.(?!resume)|tokenizer\.cache_dir"
    r"|train\.(stop_at_step|max_minutes|hang_timeout|profile|sample_\w+|log_every)$"
)
# Nor what is in no run's default name, and figures only up to rounding
ASKED_AGAIN = re.compile(
    r"checkpoint\.|guard\.(?!anticipat)|parallelism\.|(device|compile)$|train\.(micro_batch_size|recompute|\w+_every|deterministic)$"
)
LENGTH = ("train.max_steps", "train.max_tokens")
FIND_RUN = "give the folder of a run, runs/NAME, or of one of its checkpoints"

logger = logging.getLogger("v4train")


class RunDirectory:
    """Paths of a run, and the checkpoint it starts from."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples.txt"
        self.tokenizer = self.path / "tokenizer.json"
        self.report = self.path / "report"
        self.profile = self.path / "profile"
        self.heartbeat = self.path / "heartbeat.json"
        self.stacks = self.path / "stacks"
        self.launch = self.path / "launch.txt"

    def begun_by(self, launch: str | None) -> bool:
        """Whether this job has begun the run (`restarts.launch_name`), so that a further start of it continues."""
        try:
            return launch is not None and self.launch.read_text() == launch and self.holds_run()
        except (OSError, ValueError):
            return False

    def find_start(self, resume: str, overwrite: bool, resolved: dict[str, Any], again: bool = False) -> Path | None:
        """Checkpoint to start from, or None for a new run. Looks only; `prepare` writes.

        Args:
            again: the run was begun by this very job, which is started again: whatever it was told, it continues.

        Raises:
            ConfigError: `never` or a path (of a checkpoint, or a run for its newest) while the run exists, a folder
                that is no run's, or a checkpoint of another model or other data (naming the key).
        """
        exists = self.path.exists() and any(self.path.iterdir())
        if exists and not self.holds_run():
            rule = "the folder exists and holds no run"
            raise ConfigError("run.dir", self.path, rule, "choose another run.name or run.dir")
        if again and checkpoint.newest(self.checkpoints):
            resume = "auto"
        if exists and not overwrite and resume != "auto" and not again:
            rule = "a run of that name exists"
            raise ConfigError("checkpoint.resume", resume, rule, "use run.overwrite=true or another run.name")
        start = None if resume in ("auto", "never") else _checkpoint_of(Path(resume))
        if start and overwrite and start.resolve().is_relative_to(self.path.resolve()):
            rule = "run.overwrite=true would delete it"
            raise ConfigError("checkpoint.resume", resume, rule, "use another run.name for the new run")
        if start and (problem := checkpoint.damage(start)):
            raise ConfigError("checkpoint.resume", resume, f"it is damaged ({problem})", "name one that is whole")
        if exists and resume == "auto" and not overwrite:
            start = checkpoint.newest(self.checkpoints)
            if start is None and any(self.checkpoints.glob("step_*")):
                rule = f"no checkpoint under {self.checkpoints} is whole"
                raise ConfigError("checkpoint.resume", resume, rule, "use run.overwrite=true to start anew")
        if start is not None:
            self._check_same(start, resolved)
        return start

    def holds_run(self) -> bool:
        """Whether the folder is a run's: only such a one is ever written to or deleted."""
        try:
            saved = OmegaConf.load(self.config)
        except (OSError, ValueError, YAMLError):  # ValueError: no text
            return False
        return OmegaConf.is_dict(saved) and {"run", "model", "train", "checkpoint"} <= saved.keys()

    def holds(self) -> tuple[int, list[str]]:
        """What another job would change: when the settings were written, as all do, and names of checkpoints."""
        try:
            written = self.config.stat().st_mtime_ns
        except FileNotFoundError:
            written = 0
        return written, sorted(path.name for path in self.checkpoints.glob("step_*"))

    def prepare(self, overwrite: bool, resolved: dict[str, Any], launch: str | None = None) -> None:
        """Make the folder, empty if `overwrite`, of a run under way.

        With config.yaml and who has begun it (`begun_by`), without summary.json. Rank 0 only, before the others read.
        """
        if overwrite and self.holds_run():
            # What says that it is a run's goes last: a deletion that was cut off can be gone on with
            for path in sorted(self.path.iterdir(), key=lambda path: path == self.config):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        durable.replace(self.config, OmegaConf.to_yaml(OmegaConf.create(resolved)).encode())
        if launch is not None:
            durable.replace(self.launch, launch.encode())
        self.summary.unlink(missing_ok=True)  # last: where it can't go on, it has still ended

    def check_ended(self, start: Path, resolved: dict[str, Any]) -> None:
        """Of a run that has no step left: raise ConfigError where its figures would be other ones.

        One that was stopped before its end may be asked for as one that ends there: it has no summary yet.
        """
        saved = _leaves(OmegaConf.create(checkpoint.read_manifest(start)["state"]["config"]), "")
        for leaf, now in _leaves(OmegaConf.create(resolved), "").items():
            key = leaf.removeprefix(".")
            unused = key.startswith("evaluation.") and not resolved["train"]["evaluate_every"]
            unused |= key in LENGTH and not self.summary.is_file()
            if unused or BOOKKEEPING.match(key) or ASKED_AGAIN.match(key) or key in FREE:
                continue
            if leaf in saved and saved[leaf] != now:  # an older version's lacks what is new
                rule = f"the run that {self.path} holds has finished with {saved[leaf]}"
                raise ConfigError(key, now, rule, "use another run.name, or run.overwrite=true to train it anew")

    def _check_same(self, start: Path, resolved: dict[str, Any]) -> None:
        saved = OmegaConf.create(checkpoint.read_manifest(start)["state"]["config"])
        wanted = OmegaConf.create(resolved)
        for key in BOUND:
            if key == "train.sequence_length" and OmegaConf.select(wanted, "schedule.phases") is not None:
                continue  # that of the last phase, which may change as long as it has not begun
            then, now = (_leaves(OmegaConf.select(of, key), key) for of in (saved, wanted))
            then = {leaf: value for leaf, value in ADDED.items() if leaf in now} | then
            for leaf in sorted(then.keys() | now.keys()):
                if then.get(leaf) != now.get(leaf) and leaf not in FREE:
                    rule = f"checkpoint {start} was made with {leaf}={then.get(leaf, 'absent')}"
                    remedy = "use another run.name for another experiment, or run.overwrite=true to start anew"
                    raise ConfigError(leaf, now.get(leaf, "absent"), rule, remedy)


def _checkpoint_of(path: Path) -> Path:
    """The checkpoint itself, or the newest whole one of the run whose folder it is."""
    return (RunDirectory(path).holds_run() and checkpoint.newest(RunDirectory(path).checkpoints)) or path


def find_checkpoint(run: str) -> tuple[RunDirectory, Path]:
    """The run to read and its newest whole checkpoint, or the one that `run` names. Writes nothing.

    Args:
        run: folder of a run, or of one of its checkpoints.

    Raises:
        ConfigError: there is no run, it lacks a checkpoint or its tokenizer, or the checkpoint named is damaged.
    """
    path = Path(run).resolve()
    if not path.is_dir():
        raise ConfigError("run", run, "there is no such folder", FIND_RUN)
    if path.parent.name == "checkpoints":
        directory, found = RunDirectory(path.parent.parent), path
        if problem := checkpoint.damage(path):
            raise ConfigError("run", run, f"the checkpoint is damaged ({problem})", "name the run or another one of it")
    else:
        directory = RunDirectory(path)
        if not directory.holds_run():
            raise ConfigError("run", run, "the folder holds no run", FIND_RUN)
        found = checkpoint.newest(directory.checkpoints)
        if found is None:
            rule = f"no whole checkpoint lies under {directory.checkpoints}"
            raise ConfigError("run", run, rule, "continue the run until it has written one (checkpoint.every)")
    if not directory.tokenizer.is_file():
        rule = f"{directory.tokenizer} is missing"
        raise ConfigError("run", run, rule, "copy it there from where the run was made")
    return directory, found


def _leaves(node: Any, prefix: str) -> dict[str, Any]:
    """Plain values under a node by dotted key."""
    values = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    if not isinstance(values, dict):
        return {prefix: values}
    return {key: leaf for name, value in values.items() for key, leaf in _leaves(value, f"{prefix}.{name}").items()}
