"""Sampling against a slow twin, and generation with the cache against generation without."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models import random_model, random_tokens, tiny_config
from v4train.data import train_tokenizer
from v4train.errors import ConfigError
from v4train.generation import GenerationConfig, generate, probabilities, sample, stream_text

GREEDY = GenerationConfig(max_new_tokens=24, temperature=0.0, top_p=1.0, seed=1, prefill_chunk=7)
GREEDY_SHORT = replace(GREEDY, max_new_tokens=4)
NEVER = VOCAB = 63  # the models embed 64 ids: this end of document is never sampled

# Prompt and new tokens together pass each window, several compression blocks and every top-k.
MIXES = [
    "mha",
    "mqa",
    "gqa",
    "gqa:window=8",
    "gqa:window=5:dilation=3:global_tokens=2:sink=true",
    "mha:window=6:global_tokens=9",
    "mla",
    "mla:window=7:dilation=2:global_tokens=3",
    "dsa",
    "swa",
    "csa",
    "hca",
    "mha gqa:window=8 mla dsa swa csa hca mqa",
]


def run(model, prompts, config=GREEDY, *, cached=True, vocab_size=VOCAB, eos_id=NEVER):
    """New tokens of each row."""
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + config.max_new_tokens) if cached else None
    steps = list(generate(model, prompts, config, vocab_size=vocab_size, eos_id=eos_id, cache=cache))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def prompts_of(*lengths):
    return [random_tokens(1, length, seed=length)[0].tolist() for length in lengths]


@pytest.mark.parametrize("mix", MIXES)
def test_greedy_is_the_same_with_the_cache_and_without_in_a_batch_and_alone(mix):
    """The oracle is a plain loop over whole contexts."""
    model = random_model(tiny_config(mix)).eval()
    prompts = prompts_of(19, 1, 30)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(GREEDY.max_new_tokens):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1, :VOCAB].argmax()))
        expected.append(ids[len(prompt) :])
    assert run(model, prompts) == expected
    assert [run(model, [prompt])[0] for prompt in prompts] == expected


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config("swa csa")).eval()


def test_the_size_of_a_prefill_chunk_changes_nothing(model):
    prompts = prompts_of(30, 40)
    whole = run(model, prompts, replace(GREEDY, prefill_chunk=1000))
    assert all(run(model, prompts, replace(GREEDY, prefill_chunk=chunk)) == whole for chunk in (1, 4, 29, 30))


def test_the_prompt_is_read_in_chunks_and_every_token_only_once(model):
    lengths = []
    hook = model.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    run(model, prompts_of(17, 20), replace(GREEDY, max_new_tokens=3, prefill_chunk=7))
    hook.remove()
    assert lengths == [7, 7, 3, 1, 1, 1, 1, 1]  # 17, then the longer row's own tokens and the new ones but the last


def test_a_row_is_sampled_with_its_own_seed_as_if_it_were_alone(model):
    config = replace(GREEDY, temperature=1.0, top_p=0.9, seed=5)
    prompts = prompts_of(12, 9, 15)
    alone = [run(model, [prompt], replace(config, seed=5 + row))[0] for row, prompt in enumerate(prompts)]
    assert run(model, prompts, config) == alone
    assert run(model, prompts, config, cached=False) == alone
    assert run(model, prompts, replace(config, seed=6)) != alone


def test_each_row_ends_at_its_end_of_document_or_its_limit(model):
    prompts = prompts_of(12, 9, 15)
    endless = run(model, prompts)
    eos = endless[1][5]
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in endless]
    assert len(set(map(len, cut))) > 1  # one row at least goes on
    assert run(model, prompts, eos_id=eos) == cut
    assert run(model, prompts[1:2], eos_id=eos) == cut[1:2]


def test_an_end_of_document_inside_a_prompt_is_no_end(model):
    prompts = prompts_of(4, 9)
    (first, second) = run(model, prompts, eos_id=prompts[1][6])
    assert first and second


def test_it_stops_calling_the_model_when_the_last_row_has_ended(model):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    eos = run(model, prompts_of(9), replace(GREEDY, max_new_tokens=4))[0][3]
    calls.clear()
    assert len(run(model, prompts_of(9), eos_id=eos)[0]) <= 4
    hook.remove()
    assert len(calls) <= 2 + 3  # two chunks of the prompt


def test_ids_beyond_the_tokenizer_are_never_sampled(model):
    for config in (GREEDY, replace(GREEDY, temperature=3.0)):
        assert max(map(max, run(model, prompts_of(5, 8), config))) >= 20
        assert max(map(max, run(model, prompts_of(5, 8), config, vocab_size=20))) < 20


def test_tokens_come_one_by_one(model):
    """Each is there before the model is asked for the next."""
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    cache = model.new_cache(1, 20)
    counts = [
        len(calls) for _ in generate(model, prompts_of(6), GREEDY_SHORT, vocab_size=VOCAB, eos_id=NEVER, cache=cache)
    ]
    hook.remove()
    assert counts == [1, 2, 3, 4]


def test_no_gradients_are_kept_and_the_caller_keeps_them_enabled(model):
    kept = []
    hook = model.register_forward_hook(lambda module, inputs, output: kept.append(output.logits.requires_grad))
    for _ in generate(model, prompts_of(6), GREEDY_SHORT, vocab_size=VOCAB, eos_id=NEVER, cache=None):
        assert torch.is_grad_enabled()
    hook.remove()
    assert kept == [False] * 4


def test_a_model_that_diverged_says_so():
    model = random_model(tiny_config("swa")).eval()
    with torch.no_grad():
        model.head.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError):
        run(model, prompts_of(3))
    assert run(model, prompts_of(3), vocab_size=3)  # what can't be chosen does no harm


def slow_probabilities(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Softmax, then tokens from the likeliest on until they have `top_p`, one by one."""
    weights = torch.tensor(logits, dtype=torch.float64).div(temperature)
    weights = (weights - weights.max()).exp()
    weights = (weights / weights.sum()).tolist()
    kept, total = [], 0.0
    for token in sorted(range(len(weights)), key=lambda token: (-weights[token], token)):
        if total >= top_p:
            break
        kept.append(token)
        total += weights[token]
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=12),
    st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    st.sampled_from([0.001, 0.3, 0.5, 0.9, 0.999, 1.0]),
)
def test_probabilities_equal_their_slow_twin(logits, temperature, top_p):
    """Small integers, so that ties are many."""
    found = probabilities(torch.tensor(logits, dtype=torch.float32), temperature, top_p)
    expected = torch.tensor(slow_probabilities(logits, temperature, top_p), dtype=torch.float64)
    assert ((found > 0) == (expected > 0)).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_among_many_equal_tokens_the_lower_ids_are_the_nucleus():
    found = probabilities(torch.zeros(4096), 1.0, 0.25)
    torch.testing.assert_close(found, (torch.arange(4096) < 1024).double() / 1024)


def test_sampling_follows_the_probabilities():
    """10,000 draws: each share within five standard deviations."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    generator = torch.Generator().manual_seed(1)
    draws = torch.tensor([sample(logits, 0.8, 0.9, generator) for _ in range(10_000)])
    expected = torch.tensor(slow_probabilities(logits.tolist(), 0.8, 0.9))
    shares = draws.bincount(minlength=5) / len(draws)
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / len(draws)).sqrt()).all()


def test_temperature_0_is_the_likeliest_token_and_extreme_temperatures_are_finite():
    logits = torch.tensor([0.5, 3.0, -2.0])
    generator = torch.Generator().manual_seed(1)
    assert sample(logits, 0, 0.5, generator) == 1
    assert sample(logits, 1e-300, 1.0, generator) == 1
    torch.testing.assert_close(probabilities(logits, 1e300, 1.0), torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(FloatingPointError):
        sample(torch.tensor([0.0, bad]), 1.0, 1.0, torch.Generator())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("prefill_chunk", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_impossible_options_are_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=f"^{key}="):
        replace(GREEDY, **{key: value})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["naïve café, 東京 and 🙂 text " * 3], 270)


def pieces(tokenizer, ids):
    return list(stream_text(ids, tokenizer.decode))


def test_a_character_comes_out_when_its_last_byte_is_there(tokenizer):
    ids = train_tokenizer([""], 262).encode("a🙂b").tolist()  # one token a byte
    bytewise = train_tokenizer([""], 262)
    seen, out = [], []
    for piece in stream_text((seen.append(token) or token for token in ids), bytewise.decode):
        out.append((len(seen), piece))
    assert out == [(1, "a"), (5, "🙂"), (6, "b")]


@given(st.lists(st.integers(0, 269), max_size=40))
def test_pieces_together_are_the_text(tokenizer, ids):
    """Random tokens: special ones, and many bytes that are no character."""
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_bytes_that_can_become_no_character_do_not_stop_the_stream(tokenizer):
    bytewise = train_tokenizer([""], 262)
    stray = next(i for i in range(6, 262) if bytewise.decode([i]) == "\ufffd")
    assert len(pieces(bytewise, [stray] * 50)) > 25


def test_what_is_left_of_a_torn_character_comes_at_the_end(tokenizer):
    ids = train_tokenizer([""], 262).encode("é").tolist()[:1]
    assert pieces(train_tokenizer([""], 262), ids) == ["\ufffd"]
