"""One sequence of rows, whoever reads it: any ranks and workers, stopped and resumed anywhere."""

import hashlib
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.documents import FIRST, assert_every_token_once, data_config, documents_of, indexed_source
from tests.sources import write_jsonl
from v4train.data import streams
from v4train.data.corpus import Corpus, load_data
from v4train.data.loader import Batch, BatchConfig, EndOfData, Loader, merged_states
from v4train.data.packing import Row
from v4train.data.problems import DataError
from v4train.data.tokenizer import FillInMiddle, TokenizerConfig, train_tokenizer
from v4train.errors import ConfigError

G, LENGTH = 8, 12
IDS = SimpleNamespace(pad_id=2, fim_ids=FillInMiddle(3, 4, 5))


@pytest.fixture(autouse=True, scope="module")
def _small_windows():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WINDOW_DOCUMENTS": 8, "WINDOW_ROWS": 6, "LEAST_ROWS": 2, "_ENCODED": 300}.items():
            patch.setattr(streams, name, value)
        yield


def lengths_of(count, seed=0):
    return (np.random.default_rng(seed).lognormal(2.5, 0.8, count).astype(int) + 2).tolist()


def one_source(epochs=None, count=60, **others):
    return Corpus({"text": indexed_source("text", documents_of(lengths_of(count)), epochs)}), IDS, data_config(**others)


def two_sources(epochs=None, **others):
    lengths = {"a": lengths_of(40, 1), "b": lengths_of(25, 2)}
    first = {"a": FIRST, "b": FIRST + sum(lengths["a"])}
    sources = {n: indexed_source(n, documents_of(lengths[n], first[n]), epochs) for n in lengths}
    return Corpus(sources), IDS, data_config(**{"weights": {"a": 2, "b": 1}} | others)


def loader(made, rank=0, world=1, micro=1, length=LENGTH, seed=7, total=G, workers=0):
    corpus, tokenizer, data = made
    data.workers = workers
    return Loader(corpus, data, tokenizer, length, BatchConfig(total, micro, rank, world), seed)


def loaders(made, world, micro=1, state=None, **others):
    ranks = [loader(made, rank, world, micro, **others) for rank in range(world)]
    for one in ranks:
        if state:
            one.load_state_dict(json.loads(json.dumps(state)))
    return ranks


def step_of(ranks):
    """The rows of a step, in the order of the sequence, from all ranks; their counts are shared as a run does it."""
    per_rank = [one.next_step() for one in ranks]
    counts = sum((one.counts for one in ranks), Counter())
    for one in ranks:
        one.count(counts)
    batches = [batch for micro_step in zip(*per_rank, strict=True) for batch in micro_step]
    return [row for b in batches for row in torch.stack([b.input_ids, b.document_ids, b.targets], 1).tolist()]


def steps_of(ranks, count):
    found = [step_of(ranks) for _ in range(count)]
    for one in ranks:
        one.close()
    return found


def state_of(ranks):
    return json.loads(json.dumps(merged_states([one.state_dict() for one in ranks])))


def hash_of(steps):
    return hashlib.sha256(json.dumps(steps).encode()).hexdigest()


def streamed(tmp_path, names="abc", kind="jsonl", **others):
    """Files of JSON lines, tokenised on the way."""
    folder = tmp_path / "files"
    folder.mkdir(exist_ok=True)
    tokenizer_file = tmp_path / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(["text"], 262).save(tokenizer_file)
    for name in names:
        write_jsonl(folder / f"{name}.jsonl", [f"{name}{i}" * (i * 7 % 11 + 1) for i in range(40)])
    source = {"source": "jsonl", "path": str(folder), "max_document_bytes": 100}
    data = data_config(**source | {"lanes": 4} | others)
    tokenizer, corpus = load_data(data, TokenizerConfig(300, str(tmp_path / "cache"), str(tokenizer_file), 1000), 50)
    return corpus, tokenizer, data


def mixed(tmp_path, **others):
    """A streamed source and one of text files."""
    folder = tmp_path / "texts"
    folder.mkdir(exist_ok=True)
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i} " * (i % 5 + 1))
    sources = {
        "lines": {"source": "jsonl", "path": str(tmp_path / "files")},
        "texts": {"source": "text", "path": str(folder)},
    }
    return streamed(tmp_path, sources=sources, weights={"lines": 1, "texts": 3}, fim_rate=0.3, **others)


KINDS = {
    "indexed": lambda tmp_path, lanes: one_source(lanes=lanes),
    "two": lambda tmp_path, lanes: two_sources(lanes=lanes, fim_rate=0.2),
    "streamed": lambda tmp_path, lanes: streamed(tmp_path, lanes=lanes),
    "mixed": lambda tmp_path, lanes: mixed(tmp_path, lanes=lanes),
}


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sequence_is_one_for_any_ranks_and_workers(kind, lanes, tmp_path):
    made = KINDS[kind](tmp_path, lanes)
    expected = hash_of(steps_of(loaders(made, 1, G), 6))
    for world in (1, 2, 4):
        for workers in (0, 1, 3):
            for micro in (1, G // world):
                ranks = loaders(made, world, micro, workers=workers)
                assert hash_of(steps_of(ranks, 6)) == expected
                assert len({one.progress.data_hash for one in ranks}) == 1
    assert hash_of(steps_of(loaders(made, 1, seed=8), 6)) != expected


@settings(max_examples=25)
@given(
    st.sampled_from(["indexed", "two"]),
    st.sampled_from([1, 2, 3, 8, 11]),
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(1, 4)), min_size=1, max_size=5),
)
def test_stopped_anywhere_and_resumed_by_others(kind, lanes, runs):
    """`runs`: data ranks, rows of a micro-batch and steps of each."""
    made = KINDS[kind](None, lanes)
    expected, state, found = steps_of(loaders(made, 1), sum(steps for *_, steps in runs)), None, []
    for world, micro, steps in runs:
        ranks = loaders(made, world, micro, state)
        found += steps_of(ranks, steps)
        state = state_of(ranks)
    assert found == expected


@pytest.mark.parametrize("kind", ["streamed", "mixed"])
@pytest.mark.parametrize("lanes", [2, 5])
def test_streamed_and_resumed_by_others(kind, lanes, tmp_path):
    made = KINDS[kind](tmp_path, lanes)
    expected, state, found = steps_of(loaders(made, 1), 12), None, []
    for world, steps, workers in ((2, 1, 1), (4, 4, 3), (1, 2, 0), (2, 5, 2)):
        ranks = loaders(made, world, state=state, workers=workers)
        found += steps_of(ranks, steps)
        state = state_of(ranks)
    assert found == expected
    assert state["progress"] == state_of(_trained(made, 12))["progress"]


def _trained(made, steps):
    ranks = loaders(made, 1)
    steps_of(ranks, steps)
    return ranks


def test_another_batch_size_goes_on_with_the_next_rows():
    made = one_source(lanes=3)
    expected = sum(steps_of(loaders(made, 1), 6), [])
    ranks = loaders(made, 2)
    found = sum(steps_of(ranks, 3), [])
    found += sum(steps_of(loaders(made, 4, state=state_of(ranks), total=4), 6), [])
    assert found == expected


@pytest.mark.parametrize("lanes", [1, 2])
def test_every_document_of_an_epoch_is_read_once(lanes):
    made = one_source(epochs=1, lanes=lanes)
    documents = made[0].sources["text"].validation
    one, rows = loader(made, total=1), []
    with pytest.raises(EndOfData):
        while True:
            (batch,) = one.next_step()
            rows.append(Row(*(tensor[0].numpy() for tensor in (batch.input_ids, batch.document_ids, batch.targets))))
    if lanes == 1:
        assert_every_token_once(rows, documents)
    else:  # it ends with the first lane that is dry
        inputs = np.concatenate([row.input_ids[row.document_ids >= 0] for row in rows])
        assert len(set(inputs.tolist())) == len(inputs) > 0.8 * documents.num_tokens


@settings(max_examples=25)
@given(
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2, 4]),
    st.lists(st.tuples(st.integers(2, 30), st.integers(0, 3)), min_size=2, max_size=5),
    st.sampled_from(["best_fit", "concatenate"]),
)
def test_a_change_of_length_loses_and_repeats_nothing(lanes, world, phases, packing):
    """Several ranks, several changes within a window: together the rows are those of one process."""
    made = one_source(epochs=1, count=300, lanes=lanes, packing=packing)
    documents = made[0].sources["text"].validation

    def run(world):
        ranks, rows = loaders(made, world, total=4), []
        for length, steps in phases:
            state = state_of(ranks)
            for one in ranks:
                one.load_state_dict(state)
                one.set_sequence_length(length)
            rows += [row for _ in range(steps) for row in step_of(ranks)]
        return rows, state_of(ranks)

    rows, state = run(world)
    alone, state_alone = run(1)
    assert rows == alone and state == state_alone
    # The rest of the epoch, by one process a lane: nothing is missing, nothing comes twice
    rest = loader(made, total=1)
    rest.load_state_dict(state)
    rest.set_sequence_length(17)
    rows += _rest_of_lanes(rest, lanes)
    assert_every_token_once([Row(*map(np.array, row)) for row in rows], documents)
    assert rest.progress.tokens >= sum(4 * length * steps for length, steps in phases)


def _rest_of_lanes(one, lanes):
    """All rows that are left of every lane, also behind the first one that is dry."""
    rows = []
    for lane in range(lanes):
        reader = one._reader(lane)
        while (row := reader.read(lambda number: True, 0)) is not None:
            rows.append([field.tolist() for field in row.row])
    return rows


def test_streamed_lengths_change_without_loss(tmp_path):
    made = streamed(tmp_path, epochs=1, lanes=1)
    every, ranks = Counter(), loaders(made, 2, total=2)
    for length, steps in ((12, 3), (20, 2), (5, 4), (64, 0), (30, 1)):
        state = state_of(ranks)
        for one in ranks:
            one.load_state_dict(state)
            one.set_sequence_length(length)
        for row in (row for _ in range(steps) for row in step_of(ranks)):
            every.update(row[0])
    rest = loader(made, total=1, length=30)
    rest.load_state_dict(state_of(ranks))
    for row in _rest_of_lanes(rest, 1):
        every.update(row[0])
    fresh, expected = loader(made, total=1, length=400), Counter()
    for row in _rest_of_lanes(fresh, 1):
        expected.update(row[0])
    every.pop(2), expected.pop(2)  # padding
    assert every == expected and every[made[1].bos_id] > 80


def test_weights_change_at_from_tokens():
    weights = [{"from_tokens": 0, "a": 1}, {"from_tokens": 3 * G * LENGTH, "b": 1}]
    ranks = loaders(two_sources(weights=weights, lanes=2), 2)
    batches = []
    for _ in range(6):
        step_of(ranks)
        batches.append(dict(ranks[0].progress.by_source))
    assert batches[2].get("b", 0) == 0 and batches[5]["a"] == batches[2]["a"] and batches[5]["b"] > 0
    # A phase counts tokens, not rows: with rows half as long it comes after twice as many.
    halves = loader(two_sources(weights=weights, lanes=2), length=LENGTH // 2)
    steps_of([halves], 6)
    assert halves.progress.by_source["b"] == 0
    halves.next_step()
    assert halves.counts["tokens/b"] > 0


def test_weights_change_at_from_tokens_whatever_the_lengths_before():
    weights = [{"from_tokens": 0, "a": 1}, {"from_tokens": 20 * G, "b": 1}]
    one = loader(two_sources(weights=weights), length=8)
    steps_of([one], 1)
    one.set_sequence_length(4)
    steps_of([one], 3)
    assert one.progress.tokens == 20 * G and one.progress.by_source["b"] == 0
    steps_of([one], 1)
    assert one.progress.by_source["b"] > 0


def test_shares_of_the_tokens_are_those_of_the_weights():
    made = two_sources(lanes=4)
    ranks = loaders(made, 2)
    steps_of(ranks, 60)
    by_source, progress = ranks[0].progress.by_source, ranks[0].progress
    assert abs(by_source["a"] / by_source.total() - 2 / 3) < 0.02
    assert by_source.total() + progress.padding == progress.tokens == 60 * G * LENGTH
    assert progress.rows == 60 * G and progress.documents >= progress.fitting >= progress.truncated
    assert set(ranks[0].epochs()) == {"a", "b"} and ranks[0].epochs()["b"] > 1


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


def test_a_step_taken_back_comes_again():
    made = two_sources(lanes=3)
    expected, one = steps_of(loaders(made, 1), 4), loader(made, workers=2)
    step_of([one])
    state = one.state_dict()
    one.next_step()
    one.take_back()
    assert one.state_dict() == state
    assert steps_of([one], 3) == expected[1:]


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


def test_what_was_left_out_is_counted_once(tmp_path):
    """By ranks that share a lane too, by threads that read ahead, and where a run is resumed."""
    streamed(tmp_path)
    for path in (tmp_path / "files").iterdir():
        lines = path.read_text().splitlines()
        lines[10:10], lines[30:30] = ['{"text": 1}', "{broken"], ['{"text": ""}']
        path.write_text("\n".join([*lines, ""]))
    made = streamed(tmp_path, names="", lanes=1, on_error="skip", epochs=1)
    found = {}
    for world, runs in ((1, [7, 200]), (2, [1, 6, 200]), (4, [2, 2, 3, 200])):
        state = None
        for steps in runs:
            ranks = loaders(made, world, state=state, workers=world - 1, length=20, total=4)
            try:
                for _ in range(steps):
                    step_of(ranks)
            except EndOfData:
                pass
            for one in ranks:
                one.close()
            before, state = state, state_of(ranks)
        found[world] = before["left_out"], state["left_out"]
    assert found[1] == found[2] == found[4]
    on_the_way, at_the_end = (counts["jsonl"] for counts in found[1])
    assert at_the_end == {"missing_column": 3, "malformed": 3, "empty": 3}
    assert 0 < sum(on_the_way.values()) < 9


def test_a_loader_may_go_back():
    one = loader(two_sources(lanes=2))
    state, first = merged_states([one.state_dict()]), step_of([one])
    steps_of([one], 5)
    one.load_state_dict(state)
    assert step_of([one]) == first and one.progress.rows == G


def test_a_position_is_small():
    ranks = loaders(one_source(), 1)
    steps_of(ranks, 50)
    assert len(json.dumps(state_of(ranks))) < 700


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


def test_batches_are_int64_of_the_promised_shape():
    for batch in loader(one_source(), micro=4).next_step():
        for tensor in (batch.input_ids, batch.document_ids, batch.targets):
            assert tensor.dtype == torch.int64 and tensor.shape == (4, LENGTH)


def test_a_look_ahead_stays_in_its_document():
    """A document that goes on in another row ends within this one: the target behind a shard is then another's."""
    row = [torch.tensor([values]) for values in ([5, 6, 7, 30, 31, 2], [0, 0, 0, 1, 1, -1], [6, 7, 8, 31, 32, -100])]
    first, second = (Batch(*row).shard(i, 2, torch.device("cpu")) for i in range(2))
    assert first.targets.tolist() == [[6, 7, 8, -100]] and second.targets.tolist() == [[31, 32, -100, -100]]
    whole = [torch.tensor([values]) for values in ([5, 6, 7, 8], [0, 0, 0, 0], [6, 7, 8, 9])]
    first, second = (Batch(*whole).shard(i, 2, torch.device("cpu")) for i in range(2))
    assert first.targets.tolist() == [[6, 7, 8]] and second.targets.tolist() == [[8, 9, -100]]
