"""Sequences read ahead by threads, each by one of them, so that order and content are those of one thread."""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any


class Prefetch:
    """Items of several endless sequences (`readers`, by key), read ahead by `workers` threads; with 0, when asked for.

    A reader is called by one thread only. What it raises is raised by `take` in its turn.
    """

    def __init__(self, readers: Mapping[Hashable, Callable[[], Any]], workers: int, ahead: int) -> None:
        """`ahead`: most items of a sequence that wait."""
        self._readers, self._ahead = dict(readers), ahead
        self._waiting: dict[Hashable, deque] = {key: deque() for key in self._readers}
        self._changed, self._stopped = threading.Condition(), False
        keys = list(self._readers)
        self._threads = [
            threading.Thread(target=self._work, args=(own,), name=f"v4train-data-{i}", daemon=True)
            for i in range(workers)
            if (own := keys[i::workers])
        ]
        for thread in self._threads:
            thread.start()

    def take(self, key: Hashable) -> Any:
        """The next item of a sequence. What ended the sequence is raised again by every further call."""
        if not self._threads:
            return self._readers[key]()
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[key] or self._stopped)
            if self._stopped:
                raise RuntimeError("taken from after stop()")
            if isinstance(self._waiting[key][0], _Raised):
                raise self._waiting[key][0].error
            item = self._waiting[key].popleft()
            if len(self._waiting[key]) <= self._ahead // 2:
                self._changed.notify_all()
            return item

    def stop(self) -> None:
        """End the threads; what was read ahead is dropped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, keys: list[Hashable]) -> None:
        open_keys = list(keys)
        while key := self._next(open_keys):
            (own,) = key
            try:
                item = self._readers[own]()
            except BaseException as error:  # not lost: `take` raises it
                item = _Raised(error)
                open_keys.remove(own)
            with self._changed:
                self._waiting[own].append(item)
                self._changed.notify_all()

    def _next(self, keys: list[Hashable]) -> tuple[Hashable] | None:
        """The sequence of which least waits: until all are full, and then once one is half empty. None at the end."""
        with self._changed:
            if not self._few(keys, self._ahead - 1):
                # Woken at every `take`, a thread would work beside the one that takes, and hold it up
                self._changed.wait_for(lambda: self._stopped or self._few(keys, self._ahead // 2))
            if self._stopped:
                return None
            return (min(keys, key=lambda k: len(self._waiting[k])),)

    def _few(self, keys: list[Hashable], most: int) -> bool:
        """Whether of some sequence no more than `most` items wait."""
        return any(len(self._waiting[key]) <= most for key in keys)


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
