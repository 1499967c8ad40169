"""What happens when data turn out bad while they are read: stop with one line, or leave out, count and log."""

import logging
from collections import Counter
from threading import Lock

from v4train.errors import ConfigError

UNDECODABLE = "undecodable"  # bytes that aren't UTF-8, or a text that can't be written as UTF-8
EMPTY = "empty"  # nothing but white space
TOO_LARGE = "too_large"  # more bytes than data.max_document_bytes
MISSING_COLUMN = "missing_column"  # no such column, or no text in it
MALFORMED = "malformed"  # not what the file's format says
TRUNCATED = "truncated"  # the end of the file is missing
VANISHED = "vanished"  # the file is no longer there, or no longer the same
UNREACHABLE = "unreachable"  # reading failed, over the network after all attempts
KINDS = (UNDECODABLE, EMPTY, TOO_LARGE, MISSING_COLUMN, MALFORMED, TRUNCATED, VANISHED, UNREACHABLE)

POLICIES = ("error", "skip")
_LOGGED_IN_FULL = 5  # of each kind
_LONGEST_DETAIL = 300  # characters

logger = logging.getLogger("v4train")


class DataError(ConfigError):
    """Bad data met while reading: one line that names the file, the record, what is wrong and what to do about it."""


class Problems:
    """Bad data of one source, treated by a policy. Safe to share between threads."""

    def __init__(self, policy: str) -> None:
        """
        Args:
            policy: `error` or `skip`; ConfigError (data.on_error) otherwise.
        """
        if policy not in POLICIES:
            raise ConfigError("data.on_error", policy, "no such policy", f"one of {', '.join(POLICIES)}")
        self.policy = policy
        self._counts: Counter[str] = Counter()
        self._lock = Lock()

    @property
    def counts(self) -> dict[str, int]:
        """How many were left out so far, by kind; kinds that never came up are absent. A copy."""
        with self._lock:
            return dict(self._counts)

    def report(self, kind: str, file: str, record: int | None, detail: str) -> None:
        """Under `error` raise DataError; under `skip` count, and log a warning.

        The first few of a kind are logged in full, later ones only at powers of ten, so that logs stay short.

        Args:
            kind: one of KINDS.
            file: the file's name.
            record: the record's number within the file, from 0; None when the problem is the file's, not a record's.
            detail: what exactly is wrong.
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind}: no such kind of problem; one of {', '.join(KINDS)}")
        place = file if record is None else f"{file}, record {record} (from 0)"
        what = f"{place}: {kind.replace('_', ' ')}: {_one_line(detail)}"
        if self.policy == "error":
            remedy = "mend the file or leave it out, or have bad data left out and counted: data.on_error=skip"
            raise DataError("data.on_error", self.policy, what, remedy)
        with self._lock:
            self._counts[kind] += 1
            count = self._counts[kind]
        if count <= _LOGGED_IN_FULL:
            logger.warning("data left out: %s", what)
        elif str(count).rstrip("0") == "1":
            logger.warning("data left out: %d times %s; the last: %s", count, kind.replace("_", " "), what)


def _one_line(detail: str) -> str:
    line = " ".join(detail.split())
    return line if len(line) <= _LONGEST_DETAIL else f"{line[:_LONGEST_DETAIL]}..."
