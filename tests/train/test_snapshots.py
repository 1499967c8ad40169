"""What guard.snapshot=auto comes to."""

import logging
from types import SimpleNamespace

import pytest

from v4train.train import snapshots

GIB = 1 << 30


@pytest.mark.parametrize(
    ("fit", "every", "place", "said"),
    [
        (True, 0, "memory", "to memory: 2 copies take 3.0 of 16.0 GiB"),
        (False, 100, "disk", "to the last checkpoint: 2 copies take 3.0 of 16.0 GiB"),
        (False, 0, "disk", "to nothing, as checkpoint.every=0"),
    ],
)
def test_where_a_spike_goes_back_to(monkeypatch, caplog, fit, every, place, said):
    asked = []
    monkeypatch.setattr(snapshots, "fits", lambda size: asked.append(size) or (fit, 3 * GIB, 16 * GIB))
    trainer = SimpleNamespace(
        settings=SimpleNamespace(guard=SimpleNamespace(snapshot="auto"), checkpoint=SimpleNamespace(every=every)),
        engine=SimpleNamespace(snapshot_bytes=lambda: GIB),
        topology=SimpleNamespace(rank=0),
    )
    with caplog.at_level(logging.INFO, logger="v4train"):
        assert snapshots.place_for(trainer) == place
    assert asked == [2 * GIB] and said in caplog.text
    for word in ("memory", "disk"):
        trainer.settings.guard.snapshot = word
        assert snapshots.place_for(trainer) == word
    assert len(asked) == 1
