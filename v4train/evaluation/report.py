"""What was measured as tables of plain text."""

from collections.abc import Sequence
from typing import Any


def tables(found: dict[str, Any]) -> str:
    """Text of all tables, in the order text, recall, tasks; `found` as it stands in the JSON file."""
    parts = []
    if "text" in found:
        text = found["text"]
        rows = [(name, *_text_cells(of)) for name, of in {**text["by_source"], "all": text["all"]}.items()]
        parts.append(_table(("source", "bits/byte", "nats/token", "tokens"), rows))
        rows = [(f"{of['start']}-{of['stop'] - 1}", *_text_cells(of)) for of in text["by_position"]]
        parts.append(_table(("tokens before", "bits/byte", "nats/token", "tokens"), rows))
    if "recall" in found:
        rows = [
            (str(of["distance"]), _number(of["accuracy"], 3), _number(of["chance"], 3), str(of["pairs"]))
            for of in found["recall"]
        ]
        parts.append(_table(("recall at distance", "accuracy", "chance", "pairs"), rows))
    if "tasks" in found:
        rows = [
            (task, metric, _number(value, 4)) for task, of in found["tasks"].items() for metric, value in of.items()
        ]
        parts.append(_table(("task", "metric", "value"), rows))
    return "\n\n".join(parts)


def _text_cells(of: dict[str, Any]) -> tuple[str, str, str]:
    return _number(of["bits_per_byte"], 4), _number(of["loss"], 4), str(of["tokens"])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Words to the left, numbers to the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [not any(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    words[0] = True
    lines = []
    for cells in (head, ["-" * width for width in widths], *rows):
        aligned = zip(cells, widths, words, strict=True)
        lines.append("  ".join(cell.ljust(size) if left else cell.rjust(size) for cell, size, left in aligned).rstrip())
    return "\n".join(lines)
