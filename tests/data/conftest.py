"""Sizes that make small data cross the borders of windows and blocks."""

import pytest

from v4train.data import records, remote, streams


@pytest.fixture(scope="module")
def small_windows():
    """Of the module, since hypothesis runs many examples within one test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WINDOW_DOCUMENTS": 8, "WINDOW_ROWS": 6, "LEAST_ROWS": 2, "_ENCODED": 300}.items():
            patch.setattr(streams, name, value)
        yield


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(records, "_BATCH", 200)  # a few rows
    monkeypatch.setattr(records, "_PIECE", 64)
    monkeypatch.setattr(records, "_BUFFER", 128)
    monkeypatch.setattr(remote, "BLOCK", 1024)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
