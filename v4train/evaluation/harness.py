"""lm_eval tasks on a model of our own, without an export. Needs `pip install 'v4train[eval]'`.

Import it only where tasks are asked for: lm_eval takes seconds to import.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from v4train.data import Tokenizer
from v4train.data.loader import stack_rows
from v4train.data.packing import IGNORED_TARGET, Row
from v4train.data.validation import padding_row
from v4train.errors import ConfigError
from v4train.evaluation.scores import Scorer
from v4train.generation import GenerationConfig, generate
from v4train.model import Transformer

try:
    from lm_eval import evaluator
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM, TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ConfigError("tasks", "?", f"lm_eval is missing ({error})", "pip install 'v4train[eval]'") from error

NEW_TOKENS = 256  # that are generated at most where a task doesn't say


class HarnessModel(TemplateLM):
    """What lm_eval asks of a model: likelihoods of continuations and of whole texts, and greedy generation.

    Every text begins with BOS, as in training. What doesn't fit into `max_length` tokens of context is cut off at the
    left.

    Args:
        model: that generates; without one nothing can.
        even: batches are all [batch_size, max_length], as some layouts want them.
    """

    def __init__(
        self,
        model: Transformer | None,
        tokenizer: Tokenizer,
        scores_of: Scorer,
        max_length: int,
        batch_size: int,
        even: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.text, self.even = model, tokenizer, even
        self.scores_of, self.max_length, self.batch_size = scores_of, max_length, batch_size

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begin = [] if add_special_tokens is False else [self.text.bos_id]
        return [*begin, *self.text.encode(string).tolist()]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether greedy decoding gives it) of each (_, context ids,
        continuation ids)."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            rule = f"a continuation of a task has {longest} tokens, and all of them are scored"
            raise ConfigError("sequence_length", self.max_length, rule, f"use at least {longest}")
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            rows = [self._row(*requests[i][1:]) for i in chosen]
            length = self.max_length if self.even else max(len(row.input_ids) for row in rows)
            rows = [_padded(row, length, self.text.pad_id) for row in rows]
            if self.even:
                rows += [padding_row(length, self.text.pad_id)] * (self.batch_size - len(rows))
            scores = self.scores_of(stack_rows(rows))
            for i, nats, likeliest, counted in zip(chosen, *(of[: len(chosen)] for of in scores), strict=True):
                found[i] = (-float(nats[counted].double().sum()), bool(likeliest[counted].all()))
        return found

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """Targets are the continuation alone."""
        tokens = np.array([*context, *continuation][-(self.max_length + 1) :], dtype=np.int64)
        targets = tokens[1:].copy()
        targets[: len(targets) - len(continuation)] = IGNORED_TARGET
        return Row(tokens[:-1], np.zeros_like(targets), targets)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length` tokens that do not overlap."""
        windows = []
        for number, request in enumerate(requests):
            ids = self.text.encode(request.args[0]).tolist()
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(number, *make_disjoint_window(pair)) for pair in pairs]
        totals = [0.0] * len(requests)
        for (number, *_), (value, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        """Text up to the first of `settings["until"]`, the end of the document, or `max_gen_toks` tokens."""
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        new = min(int(settings.get("max_gen_toks") or NEW_TOKENS), self.max_length - 1)
        prompt = self.tok_encode(context)[-(self.max_length - new) :]
        config = GenerationConfig(new, temperature, 1.0, 1, 512)
        ids = {"vocab_size": self.text.vocab_size, "eos_id": self.text.eos_id}
        written: list[int] = []
        for (token,) in generate(self.model, [prompt], config, **ids, cache=self.model.new_cache(1, len(prompt) + new)):
            written.append(token)
            text = self.text.decode(written)
            if ends := [text.index(end) for end in until if end and end in text]:
                return text[: min(ends)]
        return self.text.decode(written)


def _padded(row: Row, length: int, pad_id: int) -> Row:
    padding = padding_row(length - len(row.input_ids), pad_id)
    return Row(*(np.concatenate(pair) for pair in zip(row, padding, strict=True)))


class _Asked(Exception):
    """All questions are there."""


class _Generates(Exception):
    """A task wants text, where there is nothing that generates."""


class _Asking(LM):
    """Has no answers: lm_eval has made the requests of all tasks when it comes for the first one.

    generates: false where no task may want text; likelihoods, which lm_eval may want first, are made up then.
    """

    def __init__(self, generates: bool) -> None:
        super().__init__()
        self.generates = generates

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.generates:
            raise _Asked
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        if self.generates:
            raise _Asked
        return [-1.0] * len(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise _Asked if self.generates else _Generates


def check_tasks(
    names: list[str], folder: str | None, few_shot: int | None, generates: bool = True, key: str = "tasks"
) -> None:
    """Make the first request of each, without a model; arguments as of `run_tasks`.

    Raises:
        ConfigError: (`key`) a name that isn't known, a task that can't be loaded or asked, or one that wants text where
            nothing `generates`.
    """
    try:
        run_tasks(_Asking(generates), names, folder, few_shot, 1, key=key)
    except _Asked:
        return
    except _Generates as error:
        rule = "one of them wants text to be generated, and while a model is trained none is"
        raise ConfigError(key, ",".join(names), rule, "ask it of a checkpoint: launch/evaluate.py tasks=") from error
    except ConfigError:
        raise
    except Exception as error:  # whatever comes from a task's file, from its data or from code of its own
        text = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "mend their files, or see that their data can be read"
        raise ConfigError(key, ",".join(names), f"lm_eval can't ask them ({text})", remedy) from error


def run_tasks(
    model: LM,
    names: list[str],
    folder: str | None,
    few_shot: int | None,
    limit: int | None,
    key: str = "tasks",
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}}; names of metrics as lm_eval gives them, standard errors as `<metric>_stderr`.

    Of the ranks of a machine lm_eval gives them to the first one only: {} on others.

    Args:
        names: of tasks, groups or tags.
        folder: of task files; None for those that lm_eval comes with.

    No random state of this process changes.

    Raises:
        ConfigError: (`key`) a name that isn't known.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        known = ", ".join(manager.all_tasks[:20])
        rule = "lm_eval has no such task" if folder is None else f"no task file under {folder} has that name"
        raise ConfigError(key, ",".join(unknown), rule, f"there are {known}" if known else "add a task file")
    with torch.no_grad():
        found = evaluator.simple_evaluate(
            model,
            tasks=names,
            task_manager=manager,
            num_fewshot=few_shot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    return {name: _numbers(values) for name, values in found["results"].items()} if found else {}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """lm_eval's "acc,none" is the metric `acc` without a filter."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and "," in key}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}
