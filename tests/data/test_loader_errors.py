"""What stops a loader: the end of its data, bad data, positions and settings that are refused."""

from collections import Counter

import pytest

from tests.loading import loader, loaders, one_source, state_of, step_of, steps_of, streamed, two_sources
from v4train.data.loader import EndOfData
from v4train.data.problems import DataError
from v4train.errors import ConfigError

pytestmark = pytest.mark.usefixtures("small_windows")


def test_a_source_that_is_dry_stops_the_run_or_is_dropped():
    seen = {}
    for when_dry in ("stop", "drop"):
        made = two_sources(epochs=1, when_dry=when_dry, lanes=1)
        one = loader(made, total=1)
        with pytest.raises(EndOfData):
            while True:
                one.next_step()
                one.count(one.counts)
        seen[when_dry] = one.progress.by_source
        sizes = {name: source.num_tokens for name, source in made[0].sources.items()}
    assert seen["drop"] == sizes
    assert any(seen["stop"][name] == sizes[name] for name in sizes) and seen["stop"] != sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_the_end_takes_nothing(workers):
    made = one_source(epochs=1, count=40, lanes=2)
    ranks = loaders(made, 2, workers=workers)
    steps, ended = 0, None
    while ended is None:
        before = state_of(ranks)
        taken = []
        for one in ranks:
            try:
                one.next_step()
                taken.append(one)
            except EndOfData:
                ended = before
        if ended is None:
            counts = sum((one.counts for one in ranks), Counter())
            for one in ranks:
                one.count(counts)
            steps += 1
    assert steps > 2
    for one in taken:
        one.take_back()
    assert state_of(ranks) == ended
    for one in set(ranks) - set(taken):
        for _ in range(2):  # and again
            with pytest.raises(EndOfData):
                one.next_step()
    assert state_of(ranks) == ended
    for one in ranks:
        one.close()


def test_bad_data_of_a_thread_are_the_loaders(tmp_path):
    made = streamed(tmp_path, lanes=1)
    (tmp_path / "files" / "b.jsonl").write_text('{"text": "good"}\n{"other": 1}\n')
    for workers in (0, 2):
        one = loader(made, workers=workers)
        for _ in range(2):
            with pytest.raises(DataError, match=r"b\.jsonl, record 1"):
                for _ in range(100):
                    one.next_step()
        one.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_once_the_data_are_mended_it_goes_on_with_the_same_row(workers, tmp_path):
    made = streamed(tmp_path, lanes=3)
    expected, path = steps_of(loaders(made, 1), 12), tmp_path / "files" / "b.jsonl"
    good = path.read_text()
    path.write_text(good.replace('{"text": "b38', '{"tixt": "b38'))
    one, found = loader(made, workers=workers), []
    with pytest.raises(DataError, match=r"b\.jsonl, record 38"):
        while True:
            found.append(step_of([one]))
    assert 0 < len(found) < 12
    path.write_text(good)
    assert found + steps_of([one], 12 - len(found)) == expected


@pytest.mark.parametrize(
    "other, key",
    [
        ({"made": one_source(count=61)}, "data"),
        ({"seed": 8}, "seed"),
        ({"made": one_source(lanes=2)}, "data"),
        ({"made": one_source(packing="concatenate")}, "data"),
        ({"made": one_source(fim_rate=0.1)}, "data"),
    ],
)
def test_a_position_in_other_rows_is_refused(other, key):
    state = state_of(loaders(one_source(), 1))
    with pytest.raises(ConfigError, match="the saved data position") as error:
        loader(**{"made": one_source()} | other).load_state_dict(state)
    assert error.value.key == key


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"length": 0}, "train.sequence_length"),
        ({"micro": 3}, "train.global_batch_size"),
        ({"micro": 0}, "train.micro_batch_size"),
        ({"world": 3}, "train.global_batch_size"),
        ({"total": 0}, "train.global_batch_size"),
        ({"seed": -1}, "seed"),
        ({"made": one_source(lanes=61)}, "data.lanes"),
        ({"made": one_source(weights={"other": 1})}, "data.weights"),
    ],
)
def test_impossible_settings_are_refused(settings, key):
    with pytest.raises(ConfigError) as error:
        loader(**{"made": one_source()} | settings)
    assert error.value.key == key
