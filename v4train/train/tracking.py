"""Weights & Biases for a run: offline by default, silent, and never a reason for a run to stop."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4train.errors import ConfigError

logger = logging.getLogger("v4train")

MODES = ("offline", "online", "disabled")


@dataclass
class TrackingConfig:
    """`conf/tracking/*.yaml`: each key is explained there.

    Raises:
        ConfigError: `mode` is none of offline, online, disabled.
    """

    mode: str
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    notes: str | None
    system_metrics: bool
    timeout: int

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                "tracking.mode", self.mode, f"must be one of {', '.join(MODES)}", "use tracking.mode=offline"
            )


class Tracker:
    """One W&B run, for rank 0; other ranks take a config with `mode: disabled`, which makes every call a no-op.

    Whatever W&B raises is caught: the first failure is logged as a warning, later ones are not, and training goes on.

    Args:
        config: the tracking group of the configuration.
        run_dir: W&B writes to `<run_dir>/wandb`, an offline run to `<run_dir>/wandb/offline-run-<time>-<id>`.
        run_name: the name shown in W&B.
        resolved_config: the whole configuration as plain dicts, shown beside the run.
        run_id: the id of the run that is continued, from its checkpoint; None starts a new one.
    """

    def __init__(
        self, config: TrackingConfig, run_dir: str | Path, run_name: str, resolved_config: dict, run_id: str | None
    ) -> None:
        self.config = config
        self.run_id = run_id
        self._run: Any = None
        self._failed = False
        if config.mode != "disabled":
            self._attempt("start", lambda: self._start(Path(run_dir), run_name, resolved_config))

    @property
    def location(self) -> str:
        """Where to look at the run: a URL (online), a folder (offline), or a word when there is none."""
        if self._run is None:
            return "failed" if self._failed else "disabled"
        return self._run.url if self.config.mode == "online" else str(Path(self._run.dir).parent)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log the figures of optimizer step `step`; entries that are None are left out, nested ones get dotted names.

        The step is a value and the x-axis, not W&B's own counter: that one refuses to go back, so it would drop what a
        run repeats after it was killed past its last checkpoint.
        """
        row = {key: value for key, value in values.items() if value is not None}
        self._attempt("log", lambda: self._run.log({**row, "step": step}))

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

    def finish(self, exit_code: int = 0) -> None:
        """Close the run, all of it on disk; a non-zero exit code marks it as failed. Further calls do nothing."""
        self._attempt("finish", lambda: self._finish(exit_code))
        self._run = None

    def _start(self, run_dir: Path, run_name: str, resolved_config: dict) -> None:
        wandb = _wandb()
        run_dir.mkdir(parents=True, exist_ok=True)  # W&B would fall back to a temporary folder
        settings = wandb.Settings(
            silent=True,
            console="off",  # log.txt holds the output; capturing it costs time and mixes with the progress bar
            disable_git=True,  # the address of a remote may hold a token
            save_code=False,
            symlink=False,
            use_dot_wandb=False,
            x_disable_stats=not self.config.system_metrics,
            init_timeout=self.config.timeout,
            login_timeout=self.config.timeout,
            finish_timeout=self.config.timeout,
            reinit="create_new",
        )
        self._run = wandb.init(
            mode=self.config.mode,
            dir=run_dir,
            id=self.run_id,
            resume="allow",  # the same id continues the run; of an offline one `wandb sync` sends the parts in order
            project=self.config.project,
            entity=self.config.entity,
            group=self.config.group,
            tags=list(self.config.tags),
            notes=self.config.notes,
            name=run_name,
            config=resolved_config,
            allow_val_change=True,  # a resumed run may change train.stop_at_step and the like
            settings=settings,
        )
        self.run_id = self._run.id
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("tokens", step_metric="step", summary="max")
        self._run.define_metric("val_loss", step_metric="step", summary="min,last")

    def _finish(self, exit_code: int) -> None:
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
                logger.warning(
                    "W&B could not %s (%s: %s); training goes on without", action, type(error).__name__, error
                )
            self._failed = True


def _wandb() -> Any:
    """Import W&B when a run is really tracked: it takes 0.7 s.

    wandb 0.31.0 reports to its makers even in offline mode (seen: a name look-up at each start); this variable, read at
    import, is its switch.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb
