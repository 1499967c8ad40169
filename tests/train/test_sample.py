"""The sample at the end of a run: called equally often on every rank, text up to the end of the document."""

import pytest
import torch

from v4train.data import train_tokenizer
from v4train.train.sample import generate

EXTRA = 5  # entries that the model embeds and the tokenizer lacks


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["import os\nimport sys\n" * 4], 270)


class Model:
    """Logits that favour `next_id(ids)`, and a record of the contexts it was called with."""

    def __init__(self, tokenizer, next_id):
        self.width, self.next_id, self.calls = tokenizer.vocab_size + EXTRA, next_id, []

    def __call__(self, ids):
        self.calls.append(ids.tolist())
        logits = torch.zeros(1, ids.shape[1], self.width)
        logits[0, -1, self.next_id(ids[0].tolist())] = 5.0
        return logits


def test_the_likeliest_token_is_appended_to_the_whole_context(tokenizer):
    script = tokenizer.encode("import sys\n").tolist()
    start = [tokenizer.bos_id, *tokenizer.encode("import os\n").tolist()]
    model = Model(tokenizer, lambda ids: script[len(ids) - len(start)])
    assert generate(model, tokenizer, "import os\n", len(script), 0, 1) == "import os\nimport sys\n"
    assert model.calls == [[[*start, *script[:count]]] for count in range(len(script))]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_model_is_called_equally_often_wherever_the_document_ends(tokenizer, temperature):
    """Ranks may disagree in the last bit, and a forward may hold collectives."""
    model = Model(tokenizer, lambda ids: tokenizer.eos_id)
    text = generate(model, tokenizer, "import", 6, temperature, 1)
    assert len(model.calls) == 6
    assert text.startswith("import")
    if temperature == 0:
        assert text == "import"


def test_ids_beyond_the_tokenizer_are_never_taken(tokenizer):
    model = Model(tokenizer, lambda ids: tokenizer.vocab_size + 2)
    generate(model, tokenizer, "import", 20, 1.0, 1)
    assert max(model.calls[-1][0]) < tokenizer.vocab_size


def test_the_text_is_a_function_of_the_seed(tokenizer):
    texts = [generate(Model(tokenizer, lambda ids: 70), tokenizer, "import", 12, 2.0, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_diverged_model_ends_the_text(tokenizer):
    calls = []

    def logits_of(ids):
        calls.append(ids)
        return torch.full((1, ids.shape[1], tokenizer.vocab_size), torch.nan)

    assert generate(logits_of, tokenizer, "import", 5, 0.7, 1) == "import"
    assert len(calls) == 1
