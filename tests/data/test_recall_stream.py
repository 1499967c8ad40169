"""Training rows of the recall task: those of `RecallTask`, in every layout and after every interruption."""

import numpy as np
import pytest

from tests.data.test_recall import TOKENIZER, statements
from tests.documents import data_config, documents_of
from tests.loading import loaders, state_of, steps_of
from v4train.data import TokenizerConfig, check_data, load_data
from v4train.data.packing import IGNORED_TARGET
from v4train.data.recall import RecallTask
from v4train.data.recall_stream import OF_A_SEED, RecallSourceConfig
from v4train.errors import ConfigError

LENGTH, SEED = 120, 7
RECALL = {"tokens_per_pair": 40, "keys": 20, "values": 10, "seed": 4, "nearest": 5, "distances": 6}
RECALL |= {"text_targets": 1.0, "contexts": None}

SIZES = {"pairs": LENGTH // 40, "keys": 20, "values": 10}
DISTANCES = [5, 9, 18, 33, 61, 115]  # the last: LENGTH - 1 - 4
TEXT = documents_of([500])


@pytest.fixture
def made(tmp_path):
    return of_text(tmp_path)


def of_text(tmp_path, **others):
    folder = tmp_path / "texts"
    folder.mkdir(parents=True)
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i} of words, " * (i % 5 + 1))
    TOKENIZER.save(tmp_path / "tokenizer.json")
    data = data_config(source="text", path=str(folder), recall=RECALL | others)
    tokenizer, corpus = load_data(data, TokenizerConfig(300, str(tmp_path), str(tmp_path / "tokenizer.json"), 1000))
    return corpus, tokenizer, data


def test_rows_are_those_of_the_task_and_none_is_of_an_evaluation(made):
    (source,) = made[0].sources.values()
    rows = np.concatenate(steps_of(loaders(made, 1, length=LENGTH, seed=SEED), 4))  # [32, 3, S]
    (documents,) = [cell.cell_contents for cell in source.stream.__closure__ if hasattr(cell.cell_contents, "flat")]
    task = RecallTask(documents, made[1], LENGTH, RECALL["seed"], distances=DISTANCES, **SIZES)
    expected = [task.row((1 + SEED) * OF_A_SEED + number).row.input_ids.tolist() for number in range(32)]
    assert sorted(rows[:, 0].tolist()) == sorted(expected)
    for input_ids, document_ids, targets in rows:
        assert (targets[:-1] == input_ids[1:]).all() and targets[-1] == IGNORED_TARGET and not document_ids.any()
        assert len(statements(task, input_ids)) >= 4


def test_ranks_and_a_resumed_run_have_the_same_rows(made):
    whole = steps_of(loaders(made, 1, length=LENGTH), 6)
    assert steps_of(loaders(made, 2, micro=2, length=LENGTH), 6) == whole
    first = loaders(made, 1, length=LENGTH)
    begun = steps_of(first, 3)
    assert begun + steps_of(loaders(made, 4, state=state_of(first), length=LENGTH), 3) == whole
    assert len({tuple(row[0]) for step in whole for row in step}) == 48
    assert steps_of(loaders(made, 1, length=LENGTH, seed=SEED + 1), 6) != whole


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_repeated_values_are_targets_and_a_share_of_all_else(tmp_path, made, share):
    whole = np.concatenate(steps_of(loaders(made, 1, length=LENGTH, seed=SEED), 8))
    some = np.concatenate(
        steps_of(loaders(of_text(tmp_path / "b", text_targets=share), 1, length=LENGTH, seed=SEED), 8)
    )
    assert (whole[:, 0] == some[:, 0]).all()
    task, trained, others = RecallTask(TEXT, TOKENIZER, LENGTH, RECALL["seed"], distances=[5], **SIZES), 0, 0
    for row, (_, _, targets) in zip(whole, some, strict=True):
        stated = {}
        for place, key, value in statements(task, row[0]):
            if key in stated:
                assert targets[place - 1] == value == stated[key]
                targets[place - 1] = IGNORED_TARGET
            stated[key] = value
        has = targets != IGNORED_TARGET
        assert (targets[has] == row[2][has]).all()
        trained, others = trained + has.sum(), others + len(has)
    assert trained / others == pytest.approx(share, abs=0.02)


def test_short_contexts_fill_rows_and_have_as_many_tokens(tmp_path):
    made = of_text(tmp_path, contexts=[LENGTH, LENGTH // 4])
    rows = np.concatenate(steps_of(loaders(made, 1, length=LENGTH, seed=SEED), 8))
    kinds = [row[1].max() for row in rows]
    assert sorted(set(kinds)) == [0, 3] and kinds.count(0) == len(rows) / 2
    for row, kind in zip(rows, kinds, strict=True):
        own = LENGTH // (kind + 1)
        assert (row[1] == np.arange(LENGTH) // own).all()
        assert (row[0][::own] == TOKENIZER.bos_id).all() and (row[2][own - 1 :: own] == IGNORED_TARGET).all()
    assert len({tuple(context) for row in rows for context in row[0].reshape(4, -1)}) == 4 * len(rows)


def test_distances_are_spread_evenly_over_octaves():
    config = RecallSourceConfig(**RECALL)
    assert config.spread(115) == DISTANCES and config.spread(7) == [5, 6, 7]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recall": RECALL | {"nearest": 0}}, "data.recall.nearest=0: at least 1"),
        ({"recall": RECALL | {"text_targets": 2.0}}, "data.recall.text_targets=2.0: a share"),
        ({"recall": RECALL | {"distances": 0}}, "data.recall.distances=0: at least 1"),
        ({"recall": RECALL | {"pears": 2}}, "data.recall.pears=2: unknown key"),
        ({"recall": RECALL, "fim_rate": 0.1}, "data.fim_rate=0.1: a pair and its repetition"),
        ({"recall": RECALL, "source": "jsonl", "path": "x"}, "data.recall=jsonl: pairs are placed in text with random"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_data(data_config(**{"source": "stdlib"} | values))


@pytest.mark.parametrize(
    ("contexts", "message"),
    [([60, 121], r"data.recall.contexts=\[60, 121\]: a row has"), ([8], "data.recall.contexts=8: its last value")],
)
def test_contexts_that_do_not_fit_are_refused(tmp_path, contexts, message):
    (loader,) = loaders(of_text(tmp_path, contexts=contexts), 1, length=LENGTH)
    with pytest.raises(ConfigError, match=f"^{message}"):
        loader.next_step()
    loader.close()
