"""Weights & Biases for a run: offline by default, silent, and never a reason for a run to stop."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4train.errors import ConfigError
from v4train.train.signals import REQUEUE

logger = logging.getLogger("v4train")

MODES = ("offline", "online", "disabled")
ARTIFACTS = {"checkpoint": "model", "tokenizer": "tokenizer"}  # what can be sent, and its type in W&B


@dataclass
class TrackingConfig:
    """`conf/tracking/*.yaml`: each key is explained there.

    Raises:
        ConfigError: `mode` is none of offline, online, disabled, or an artifact is unknown.
    """

    mode: str
    project: str
    entity: str | None
    group: str | None
    job_type: str | None
    tags: list[str]
    notes: str | None
    artifacts: list[str]
    system_metrics: bool
    timeout: int

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                "tracking.mode", self.mode, f"must be one of {', '.join(MODES)}", "use tracking.mode=offline"
            )
        for name in self.artifacts:
            if name not in ARTIFACTS:
                rule = f"there are {', '.join(ARTIFACTS)}"
                raise ConfigError("tracking.artifacts", name, rule, "use tracking.artifacts=[checkpoint,tokenizer]")


class Tracker:
    """One W&B run, for rank 0; other ranks take a config with `mode: disabled`, which makes every call a no-op.

    Whatever W&B raises is caught: the first failure is logged as a warning, later ones are not, and training goes on.
    Where a start online fails, the run is tracked offline.

    Args:
        config: the tracking group of the configuration.
        run_dir: W&B writes to `<run_dir>/wandb`, an offline run to `<run_dir>/wandb/offline-run-<time>-<id>`.
        run_name: the name shown in W&B, unless its variable WANDB_NAME gives another.
        resolved_config: the whole configuration as plain dicts, shown beside the run.
        run_id: the id of the run that is continued, from its checkpoint; None takes that of the run that was started
            in this folder before, or where there was none that of W&B's variable WANDB_RUN_ID, or a new one.
    """

    def __init__(
        self, config: TrackingConfig, run_dir: str | Path, run_name: str, resolved_config: dict, run_id: str | None
    ) -> None:
        self.config, self.run_id = config, run_id
        self._run: Any = None
        self._failed = False
        if config.mode != "disabled":
            self._attempt("start", lambda: self._start(Path(run_dir), run_name, resolved_config))

    @property
    def location(self) -> str:
        """Where to look at the run: a URL (online), a folder (offline), or a word when there is none."""
        if self._run is None:
            return "failed" if self._failed else "disabled"
        return str(Path(self._run.dir).parent) if self._run.offline else self._run.url

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log the figures of optimizer step `step`; nested ones get dotted names, None and lists are left out.

        The step is a value and the x-axis, not W&B's own counter: that one refuses to go back, so it would drop what a
        run repeats after it was killed past its last checkpoint.
        """
        self._attempt("log", lambda: self._run.log({**_scalars(values), "step": step}))

    def image(self, key: str, path: str | Path, step: int) -> None:
        """Log a picture file."""
        self._attempt("log a picture", lambda: self._run.log({key: _wandb().Image(str(path)), "step": step}))

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table, for instance generated samples: columns ["prompt", "text"] and one row a sample."""
        self._attempt(
            "log a table",
            lambda: self._run.log(
                {key: _wandb().Table(columns=list(columns), data=[list(row) for row in rows]), "step": step}
            ),
        )

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the final figures, which W&B shows in its table of runs."""
        self._attempt("write the summary", lambda: self._run.summary.update(dict(values)))

    def artifact(self, kind: str, path: Path, step: int) -> None:
        """Keep a checkpoint's folder or the tokenizer's file as an artifact, if `tracking.artifacts` asks for it.

        Nothing is copied: of an offline run it must lie there until `wandb sync`.
        """
        if kind in self.config.artifacts:
            self._attempt(f"keep the {kind}", lambda: self._keep(kind, path, step))

    def _keep(self, kind: str, path: Path, step: int) -> None:
        name = re.sub(r"[^\w.-]+", "-", f"{self._run.name}-{kind}")
        artifact = _wandb().Artifact(name, type=ARTIFACTS[kind], metadata={"step": step, "run": self._run.name})
        add = artifact.add_dir if path.is_dir() else artifact.add_file
        add(str(path), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def finish(self, exit_code: int = 0) -> None:
        """Close the run, all of it on disk; further calls do nothing.

        exit_code: the program's: 0 finished, REQUEUE saved to be continued (preempted, in W&B's words), else failed.
        """
        self._attempt("finish", lambda: self._finish(exit_code))
        self._run = None

    def _start(self, run_dir: Path, run_name: str, resolved_config: dict) -> None:
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)  # W&B would fall back to a temporary one
        known = folder / "run-id"  # so that a run killed before its first checkpoint continues too
        if self.run_id is None and known.is_file():
            self.run_id = known.read_text().strip()
        try:
            self._run = self._init(self.config.mode, run_dir, run_name, resolved_config)
        except Exception as error:
            if self.config.mode != "online":
                raise
            self._run = self._init("offline", run_dir, run_name, resolved_config)
            logger.warning(
                "W&B can't be reached (%s): the run is tracked offline, and `wandb sync` sends it later", _line(error)
            )
        self.run_id = self._run.id
        known.write_text(self.run_id + "\n")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("tokens", step_metric="step", summary="max")
        # Runs with other batch sizes are compared by what they have read
        self._run.define_metric("val_loss", step_metric="tokens", summary="min,last")
        self._run.define_metric("val_bits_per_byte", step_metric="tokens", summary="min,last")

    def _init(self, mode: str, run_dir: Path, run_name: str, resolved_config: dict) -> Any:
        wandb, config = _wandb(), self.config
        settings = wandb.Settings(
            silent=True,
            console="off",  # log.txt holds the output; capturing it costs time and mixes with the progress bar
            disable_git=True,  # the address of a remote may hold a token
            save_code=False,
            symlink=False,
            use_dot_wandb=False,
            x_disable_stats=not config.system_metrics,
            init_timeout=config.timeout,
            login_timeout=config.timeout,
            finish_timeout=config.timeout,
            reinit="create_new",
        )
        return wandb.init(
            mode=mode,
            dir=run_dir,
            id=self.run_id,  # None leaves it to WANDB_RUN_ID
            resume="allow",  # the same id continues the run; of an offline one `wandb sync` sends the parts in order
            project=config.project,
            # None leaves these to W&B's own variables: WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS ...
            entity=config.entity,
            group=config.group,
            job_type=config.job_type,
            tags=list(config.tags) or None,
            notes=config.notes,
            name=os.environ.get("WANDB_NAME") or run_name,
            config=resolved_config,
            allow_val_change=True,  # a resumed run may change train.stop_at_step and the like
            settings=settings,
        )

    def _finish(self, exit_code: int) -> None:
        if exit_code == REQUEUE:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)
        # wandb 0.31.0: its helper may write records only when it ends (seen: a file of 7 bytes after finish()), and a
        # program that leaves by os._exit would not wait for that
        _wandb().teardown(exit_code=exit_code)

    def _attempt(self, action: str, call: Callable[[], Any]) -> None:
        """Run `call` if there is a run; W&B may fail in any way (network, disk, its helper): that is a warning."""
        if self._run is None and action != "start":
            return
        try:
            call()
        except Exception as error:
            if not self._failed:
                logger.warning("W&B could not %s (%s); training goes on without", action, _line(error))
            self._failed = True


def _scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without None and lists (the load of each expert), which make no curve."""
    nested = {key: _scalars(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in nested.items() if value is not None and not isinstance(value, list)}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _wandb() -> Any:
    """Import W&B when a run is really tracked: it takes 0.7 s.

    wandb 0.31.0 reports to its makers even in offline mode (seen: a name look-up at each start); this variable, read at
    import, is its switch.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb
