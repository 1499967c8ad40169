"""All that is measured on our own rows, in one dictionary; of one process, or of ranks whose sums add up."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from v4train.data import Corpus, Tokenizer
from v4train.data.recall import RecallTask
from v4train.evaluation.config import EvaluationConfig
from v4train.evaluation.recall import recall_figures, recall_sums
from v4train.evaluation.scores import Scorer
from v4train.evaluation.text import text_figures, text_sums_by_source


def recall_task(config: EvaluationConfig, corpus: Corpus, tokenizer: Tokenizer, length: int) -> RecallTask | None:
    """The task, its text from the first source's held-out documents; None where no rows are asked for.

    Raises ConfigError: it doesn't fit the rows or the tokenizer.
    """
    if not config.recall_rows:
        return None
    text = next(iter(corpus.sources.values())).validation
    distances, sizes = config.recall_distances, config.recall_sizes
    return RecallTask(text, tokenizer, length, config.seed, distances=distances, **sizes)


def measure(
    config: EvaluationConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    scores_of: Scorer,
    *,
    length: int,
    batch_size: int,
    rank: tuple[int, int] = (0, 1),
    over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, Any]:
    """{"text": ..., "recall": ...} as of `text_figures` and `recall_figures`; what isn't asked for is left out.

    length, batch_size: of the rows. rank: number of this data rank, and of how many. over_ranks: sum of a tensor over
    all ranks.

    Raises:
        ConfigError: the recall task doesn't fit the rows or the tokenizer.
    """
    found: dict[str, Any] = {}
    task = recall_task(config, corpus, tokenizer, length)  # first: it may refuse
    if config.tokens:
        sizes = {"tokens": config.tokens, "length": length, "batch_size": batch_size, "rank": rank}
        sums = over_ranks(text_sums_by_source(corpus, tokenizer, scores_of, **sizes))
        found["text"] = text_figures(sums, corpus.sources, length)
    if task is not None:
        sums = recall_sums(task, scores_of, config.recall_rows, batch_size, rank)
        found["recall"] = recall_figures(over_ranks(sums), task)
    return found


def flat(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The same for a line of metrics: ("eval/bits_per_byte", 1.2), (".../stdlib", ...), ("eval/recall/64", 0.9) ..."""
    if "text" in found:
        text = found["text"]
        yield "eval/bits_per_byte", text["all"]["bits_per_byte"]
        yield from ((f"eval/bits_per_byte/{name}", of["bits_per_byte"]) for name, of in text["by_source"].items())
        for of in text["by_position"]:
            yield f"eval/bits_per_byte_at/{of['start']}", of["bits_per_byte"]
    yield from ((f"eval/recall/{of['distance']}", of["accuracy"]) for of in found.get("recall", []))
    for task, metrics in found.get("tasks", {}).items():
        yield from ((f"eval/tasks/{task}/{metric}", value) for metric, value in metrics.items())
