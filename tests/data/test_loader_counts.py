"""What the rows hold and what is counted of them: shares and phases of the sources, records left out, shapes."""

import pytest
import torch

from tests.loading import LENGTH, G, loader, loaders, one_source, state_of, step_of, steps_of, streamed, two_sources
from v4train.data.loader import Batch, EndOfData

pytestmark = pytest.mark.usefixtures("small_windows")


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


def test_batches_are_int64_of_the_promised_shape():
    for batch in loader(one_source(), micro=4).next_step():
        for tensor in (batch.input_ids, batch.document_ids, batch.targets):
            assert tensor.dtype == torch.int64 and tensor.shape == (4, LENGTH)


def test_a_look_ahead_stays_in_its_document():
    """A document that goes on in another row ends within this one: what is behind a shard is then another's."""
    row = [torch.tensor([values]) for values in ([5, 6, 7, 30, 31, 2], [0, 0, 0, 1, 1, -1], [6, 7, 8, 31, 32, -100])]
    first, second = (Batch(*row).shard(i, 2, torch.device("cpu")) for i in range(2))
    assert first.targets.tolist() == [[6, 7, 8, -100, -100]] and second.targets.tolist() == [[31, 32] + 3 * [-100]]
    whole = [torch.tensor([values]) for values in ([5, 6, 7, 8], [0, 0, 0, 0], [6, 7, 8, 9])]
    first, second = (Batch(*whole).shard(i, 2, torch.device("cpu")) for i in range(2))
    assert first.targets.tolist() == [[6, 7, 8, 7]] and second.targets.tolist() == [[8, 9, -100, 9]]
