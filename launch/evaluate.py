"""What a run is worth: `python launch/evaluate.py run=runs/flash_small tasks=mine task_path=tasks/`.

Arguments are key=value; keys, meaning and defaults: conf/evaluate.yaml and conf/evaluation/default.yaml. Tables go to
stdout, the same numbers to a JSON file. docs/evaluation.md says what is measured.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf

from v4train.config import PRECISIONS, checked_device
from v4train.data import Corpus, DataConfig, Tokenizer, TokenizerConfig, load_data
from v4train.errors import ConfigError, refusing_bad_input
from v4train.evaluation.config import EvaluationConfig
from v4train.evaluation.measure import measure, recall_task
from v4train.evaluation.report import tables
from v4train.evaluation.scores import scorer
from v4train.overrides import config_dir
from v4train.structured import key_values, structured, wants_help
from v4train.train.checkpoint import load_model, read_manifest
from v4train.train.metrics import write_summary
from v4train.train.run_directory import RunDirectory, find_checkpoint

LISTS = ("recall_distances", "tasks")  # keys whose values are a,b,c or [a,b,c]


@dataclass
class EvaluateConfig(EvaluationConfig):
    """Values and their meaning: conf/evaluate.yaml."""

    PREFIX: ClassVar[str] = ""

    run: str | None
    out: str | None
    sequence_length: int | None
    batch_size: int
    device: str
    precision: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run is None:
            raise ConfigError("run", "missing", "nothing says what to evaluate", "give run=runs/NAME")
        for key, least in (("sequence_length", 2), ("batch_size", 1)):
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise ConfigError(key, getattr(self, key), f"it must be at least {least}", "choose a larger number")
        if not (self.tokens or self.recall_rows or self.tasks):
            raise ConfigError("tokens", self.tokens, "nothing is asked for", "give tokens=, recall_rows= or tasks=")
        if self.precision not in PRECISIONS:
            raise ConfigError("precision", self.precision, "unknown precision", f"use one of {', '.join(PRECISIONS)}")
        self.device = checked_device(self.device)


def main(arguments: list[str]) -> None:
    if wants_help(arguments):
        return print(__doc__)
    config = read_arguments(arguments)
    if config.tasks:
        from v4train.evaluation import harness  # first: it may be missing
    directory, path = find_checkpoint(config.run)
    if config.tasks:
        harness.check_tasks(config.tasks, config.task_path, config.few_shot)
    manifest = read_manifest(path)
    trained = manifest["state"]["config"]
    length = config.sequence_length or trained_length(manifest["state"])
    tokenizer, corpus = read_data(config, directory, trained)
    recall_task(config, corpus, tokenizer, length)  # it may refuse
    model = load_model(path).to(config.device)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise diverged(config.run)
    scores_of = scorer(model, config.device)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
        try:
            found = measure(config, corpus, tokenizer, scores_of, length=length, batch_size=config.batch_size)
            if config.tasks:
                asked = harness.HarnessModel(model, tokenizer, scores_of, length, config.batch_size)
                few_shot, limit = config.few_shot, config.task_limit
                found["tasks"] = harness.run_tasks(asked, config.tasks, config.task_path, few_shot, limit)
        except FloatingPointError as error:
            raise diverged(config.run) from error
    if "text" in found and not math.isfinite(found["text"]["all"]["loss"]):
        raise diverged(config.run)
    print(tables(found))
    out = Path(config.out or directory.path / "evaluation" / f"{path.name}.json")
    about = {"run": str(directory.path), "checkpoint": path.name, "step": manifest["step"]}
    write(out, about | {"sequence_length": length, "settings": asdict(config)} | found)
    print(f"written to {out}", file=sys.stderr)


def read_arguments(arguments: list[str]) -> EvaluateConfig:
    """Configuration from key=value arguments over the two files.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a rule broken.
    """
    values: dict[str, Any] = {}
    for file in ("evaluation/default.yaml", "evaluate.yaml"):
        values |= OmegaConf.to_container(OmegaConf.load(config_dir() / file))
    given: dict[str, Any] = key_values(arguments, values, "for example batch_size=4")
    for key in set(LISTS) & given.keys():
        if given[key] != "null":
            given[key] = [part.strip() for part in given[key].strip("[] ").split(",") if part.strip()]
    nothing = {key: None for key, value in given.items() if value == "null"}
    return structured(EvaluateConfig, values | given | nothing, "")


def read_data(config: EvaluateConfig, directory: RunDirectory, trained: dict[str, Any]) -> tuple[Tokenizer, Corpus]:
    """The run's own tokenizer and held-out documents. Raises ConfigError (data.*) where they are gone."""
    data = structured(DataConfig, trained["data"], "data")
    own = trained["tokenizer"] | {"path": str(directory.tokenizer)}
    tokens = config.held_out_tokens(trained["train"]["validation_tokens"])
    return load_data(data, structured(TokenizerConfig, own, "tokenizer"), tokens)


def trained_length(state: dict[str, Any]) -> int:
    """Tokens of a row in the last step before a checkpoint, from what its manifest says of the run."""
    history = state.get("history")  # absent or empty: of an older version, or before the first step
    return history[-1][1] if history else state["config"]["train"]["sequence_length"]


def diverged(run: str) -> ConfigError:
    return ConfigError(
        "run", run, "the model has diverged: its losses or parameters are not finite", "use another checkpoint"
    )


def write(out: Path, found: dict[str, Any]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_summary(out, found)
    except OSError as error:
        raise ConfigError("out", out, f"it can't be written ({error.strerror})", "name another file") from error


if __name__ == "__main__":
    with refusing_bad_input():
        main(sys.argv[1:])
