"""Properties that every attention kind must have, and equalities between kinds."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import random_model, random_tokens, tiny_config
from v4train.errors import ConfigError

KINDS = ["mha", "mqa", "gqa", "mla", "dsa", "swa", "csa", "hca"]
LOCAL = ["mha", "mqa", "gqa", "mla"]
CLOSE = 2e-5

options = st.builds(
    lambda window, dilation, first, sink: "".join(
        [
            f":window={window}" if window else "",
            f":dilation={dilation}" if window and dilation > 1 else "",
            f":global_tokens={first}" if window and first else "",
            ":sink=true" if sink else "",
        ]
    ),
    st.none() | st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 4),
    st.booleans(),
)
layers = st.one_of(st.builds(str.__add__, st.sampled_from(LOCAL), options), st.sampled_from(KINDS))
mixes = st.lists(layers, min_size=1, max_size=4)


@functools.lru_cache(maxsize=4)
def model_of(mix, **changes):
    return random_model(tiny_config(mix, mtp__num_layers=0, **changes)).eval()


def logits(model, tokens, ids=None):
    with torch.no_grad():
        return model(tokens, ids).logits


def in_pieces(model, tokens, pieces):
    """Logits of `tokens` fed to a cache so many at a time."""
    cache, parts = model.new_cache(tokens.shape[0], tokens.shape[1]), []
    for part in tokens.split(pieces, dim=1):
        parts.append(model(part, cache=cache).logits)
    assert cache.length == tokens.shape[1]
    return torch.cat(parts, dim=1)


def check(ours, theirs, tolerance=CLOSE):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[45], [1] * 45, [16, 1, 28], [7, 3, 1, 1, 20, 13]])
def test_decoding_equals_one_forward_pass(kind, pieces):
    model, tokens = model_of((kind, kind)), random_tokens(2, 45)
    check(in_pieces(model, tokens, pieces), logits(model, tokens))


@settings(max_examples=50)
@given(
    mix=mixes,
    data=st.data(),
    residual=st.sampled_from(["plain", "hc", "mhc"]),
    ffn=st.sampled_from(["moe", "dense moe"]),
)
def test_any_mix_decodes_as_it_reads(mix, data, residual, ffn):
    mix = [*mix, mix[0]]
    hashed = 1 if ffn == "moe" else 0
    model = model_of(tuple(mix), residual__kind=residual, ffn_mix=ffn, moe__num_hash_layers=hashed)
    length = data.draw(st.integers(1, 50))
    pieces = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    pieces = [*pieces[: sum(sum(pieces[: i + 1]) < length for i in range(len(pieces)))]]
    pieces.append(length - sum(pieces))
    tokens = random_tokens(data.draw(st.integers(1, 3)), length)
    check(in_pieces(model, tokens, pieces), logits(model, tokens))


@settings(max_examples=50)
@given(mix=mixes, data=st.data())
def test_any_mix_is_causal_and_keeps_documents_apart(mix, data):
    model = model_of(tuple(mix))
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    tokens = random_tokens(1, sum(lengths))
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    packed = logits(model, tokens, ids)
    start = 0
    for length in lengths:
        check(packed[:, start : start + length], logits(model, tokens[:, start : start + length]))
        start += length
    position = data.draw(st.integers(0, sum(lengths) - 1))
    future = tokens.clone()
    future[:, position:] = (future[:, position:] + 1) % 64
    # Experts get other numbers of tokens, and products of another size round otherwise
    check(logits(model, future, ids)[:, :position], packed[:, :position], 1e-6 * packed.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_under_autocast(kind):
    """With a bfloat16 cache: close to the same without one, and stored in two bytes a value."""
    model, tokens = model_of((kind, kind)), random_tokens(2, 45)
    with torch.autocast("cpu", torch.bfloat16):
        whole = logits(model, tokens)
        cache = model.new_cache(2, 45, torch.bfloat16)
        parts = [model(part, cache=cache).logits for part in tokens.split([20, 1, 3, 21], dim=1)]
    assert cache.nbytes() * 2 == model.new_cache(2, 45).nbytes()
    difference = (torch.cat(parts, dim=1) - whole).abs()
    # where rounding changes what the indexer selects, single positions differ more
    assert difference.mean() < 0.05 * whole.std()


def sharded(model):
    """As under ZeRO 3: a parameter has its numbers only while the module that owns it runs its `forward`."""
    whole = {parameter: parameter.data for parameter in model.parameters()}

    def show(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def hide(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in model.modules():
        hide(module)
        module.register_forward_pre_hook(show)
        module.register_forward_hook(hide)
    return model


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_read_by_their_owners_alone(kind, residual):
    """DESIGN 6. With and without a cache, for logits and losses."""
    word = f"{kind}:sink=true:window=9:global_tokens=1" if kind in LOCAL else kind
    config = tiny_config([word, kind], residual__kind=residual, moe__expert_bias=True, mtp__attention=kind)
    tokens = random_tokens(2, 40)
    whole = random_model(config)
    expected, cache = logits(whole.eval(), tokens), whole.new_cache(2, 40)
    loss = whole.train()(tokens, targets=tokens).loss
    model = sharded(random_model(config))
    assert torch.equal(logits(model.eval(), tokens), expected)
    check(torch.cat([model(part, cache=cache).logits for part in tokens.split(20, dim=1)], dim=1), expected)
    assert torch.equal(model.train()(tokens, targets=tokens).loss, loss)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights(kind):
    model = random_model(tiny_config([kind, kind])).bfloat16()
    tokens = random_tokens(2, 40)
    model(tokens, targets=tokens).loss.backward()
    cache = model.eval().new_cache(2, 40)
    assert in_pieces(model, tokens, [30, 1, 9]).isfinite().all()
    assert cache.nbytes() * 2 == model_of((kind, kind)).new_cache(2, 40).nbytes()


def test_generation_records_and_counts_nothing():
    """Even in training mode."""
    model = random_model(tiny_config("dsa csa mla")).train()
    tokens = random_tokens(2, 20)
    model(tokens, cache=model.new_cache(2, 20))
    assert model.losses.collect() == {}
    assert all(router.take_load().sum() == 0 for router in model.routers().values())
    with pytest.raises(ValueError, match="targets and a cache"):
        model(tokens, targets=tokens, cache=model.new_cache(2, 20))


def test_what_does_not_fit_a_cache_is_refused():
    model = model_of(("gqa", "csa"))
    tokens, cache = random_tokens(2, 12), model.new_cache(2, 10)
    for bad, ids, message in [
        (tokens[:1, :5], None, "holds 2 rows"),
        (tokens, None, "room for 10 tokens"),
        (tokens[:, :6], torch.tensor([[0, 0, 0, 1, 1, 1]] * 2), "one document"),
        (tokens[:, :6], torch.full((2, 6), -1), "without padding"),
    ]:
        with pytest.raises(ConfigError, match=message):
            model(bad, ids, cache=cache)
    assert cache.length == 0
    check(model(tokens[:, :10], torch.full((2, 10), 7), cache=cache).logits, logits(model, tokens[:, :10]))


def copied(source, target):
    target.load_state_dict(source.state_dict())
    return target.eval()


def test_mqa_is_gqa_with_one_kv_head():
    tokens = random_tokens(2, 37)
    one = random_model(tiny_config("mqa mqa"))
    other = copied(one, random_model(tiny_config("gqa gqa", attention__gqa__num_kv_heads=1), seed=1))
    assert torch.equal(logits(one.eval(), tokens), logits(other, tokens))


def test_mha_is_gqa_with_as_many_kv_heads_and_gqa_is_mha_with_repeated_ones():
    tokens = random_tokens(2, 37)
    mha = random_model(tiny_config("mha mha"))
    gqa = copied(mha, random_model(tiny_config("gqa gqa", attention__gqa__num_kv_heads=4), seed=1))
    assert torch.equal(logits(mha.eval(), tokens), logits(gqa, tokens))
    two = random_model(tiny_config("gqa gqa"))  # two KV heads for four heads
    state = two.state_dict()
    for name in [name for name in state if name.endswith((".key.weight", ".value.weight"))]:
        state[name] = state[name].unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    mha.load_state_dict(state)
    check(logits(mha, tokens), logits(two.eval(), tokens))


@pytest.mark.parametrize("kind", LOCAL)
def test_a_window_as_long_as_the_sequence_is_none(kind):
    tokens = random_tokens(2, 33)
    full = random_model(tiny_config([kind]))
    for word in (f"{kind}:window=33", f"{kind}:window=50", f"{kind}:window=33:global_tokens=5"):
        check(logits(copied(full, random_model(tiny_config([word]))), tokens), logits(full.eval(), tokens))
    short = copied(full, random_model(tiny_config([f"{kind}:window=32"])))
    difference = (logits(short, tokens) - logits(full, tokens)).abs().amax((0, 2))
    assert difference[:32].max() < CLOSE < difference[32]


@pytest.mark.parametrize("kind", ["csa", "dsa"])
@pytest.mark.parametrize("top_k", [40, 100])
def test_top_k_of_all_that_is_visible_is_the_dense_mode(kind, top_k):
    section = "indexer" if kind == "csa" else "dsa"
    model = random_model(tiny_config([kind, kind], **{f"attention__{section}__top_k": top_k})).eval()
    tokens = random_tokens(2, 40)
    sparse = logits(model, tokens)
    model.attention_mode = "dense"
    check(logits(model, tokens), sparse)
    check(in_pieces(model, tokens, [9, 1, 30]), sparse)


def test_dsa_with_all_tokens_is_mla():
    tokens = random_tokens(2, 40)
    dsa = random_model(tiny_config("dsa dsa", attention__dsa__top_k=40))
    mla = random_model(tiny_config("mla mla"))
    mla.load_state_dict({name: value for name, value in dsa.state_dict().items() if "indexer" not in name})
    check(logits(mla.eval(), tokens), logits(dsa.eval(), tokens))


def reach(word, length=40, ids=None):
    """[S, S] bool of one attention layer: does token j change the output at token i?"""
    model = random_model(tiny_config([word], mtp__num_layers=0, residual__kind="plain")).eval()
    attention, x = model.blocks[0].attention, torch.randn(1, length, 32, generator=torch.Generator().manual_seed(2))
    ids = torch.zeros(1, length, dtype=torch.long) if ids is None else ids
    with torch.no_grad():
        before, seen = attention(x, ids)[0], torch.zeros(length, length, dtype=torch.bool)
        for token in range(length):
            changed = x.clone()
            changed[0, token] += 1
            seen[:, token] = (attention(changed, ids)[0] - before).abs().amax(-1) > 1e-6
    return seen


@pytest.mark.parametrize("kind", LOCAL)
@pytest.mark.parametrize(("window", "dilation", "first"), [(5, 1, 0), (4, 3, 0), (3, 1, 2), (3, 4, 3), (1, 1, 1)])
def test_what_a_window_sees(kind, window, dilation, first):
    word = f"{kind}:window={window}:dilation={dilation}:global_tokens={first}"
    lengths = [13, 27]
    ids = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))[None]
    expected = torch.zeros(40, 40, dtype=torch.bool)
    for start, stop in ((0, 13), (13, 40)):
        for query in range(start, stop):
            for step in range(window):
                if query - step * dilation >= start:
                    expected[query, query - step * dilation] = True
            expected[query, start : min(start + first, query + 1)] = True
    assert torch.equal(reach(word, ids=ids), expected)


@pytest.mark.parametrize("kind", LOCAL)
def test_a_sink_takes_attention_away(kind):
    tokens = random_tokens(1, 20)
    plain = random_model(tiny_config([kind]))
    sunk = random_model(tiny_config([f"{kind}:sink=true"]))
    sunk.load_state_dict(plain.state_dict(), strict=False)
    parameter = sunk.blocks[0].attention.sink
    with torch.no_grad():
        parameter.fill_(-100.0)
        check(logits(sunk.eval(), tokens), logits(plain.eval(), tokens))
        parameter.fill_(100.0)
        document = torch.zeros(1, 20, dtype=torch.long)
        assert sunk.blocks[0].attention(torch.randn(1, 20, 32), document).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_rotation_makes_logits_depend_on_distance_alone(kind):
    """The second of two equal documents in a row, far from position 0 of the row, gives the same; partial RoPE too."""
    tokens = random_tokens(1, 20).repeat(1, 2)
    ids = torch.tensor([[0] * 20 + [1] * 20])
    model = model_of((kind,), attention__gqa__rope_dim=4)
    out = logits(model, tokens, ids)
    check(out[:, 20:], out[:, :20])


def test_norms_of_queries_and_keys():
    """With them, scaling the projections changes nothing."""
    model = random_model(tiny_config("gqa gqa", attention__gqa__qk_norm=True, norm_eps=1e-12)).eval()
    tokens = random_tokens(1, 20)
    before = logits(model, tokens)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query.weight.mul_(7)
            block.attention.key.weight.mul_(0.2)
    check(logits(model, tokens), before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_every_kind_is_trained(kind):
    sink = ":sink=true" if kind in LOCAL else ""
    model = random_model(tiny_config([kind + sink] * 2, attention__gqa__bias=True, attention__gqa__qk_norm=True))
    tokens = random_tokens(2, 40)
    model(tokens, targets=tokens.roll(-1, 1)).loss.backward()
    for name, parameter in model.named_parameters():
        # a softmax ignores what all keys have in common
        if ".experts." not in name and not name.endswith("attention.key.bias"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_gradient_of_the_chunked_core_with_groups_windows_and_global_tokens():
    """Against the same model with one chunk in fp64, and finite differences."""
    mix = ["gqa:window=4:dilation=2:global_tokens=2:sink=true", "mla:window=5:global_tokens=1"]
    tokens = random_tokens(1, 24)
    gradients = []
    for chunk in (5, 64):
        model = random_model(tiny_config(mix, attention__query_chunk=chunk, mtp__num_layers=0)).double()
        model(tokens, targets=tokens.roll(-1, 1)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-12, rtol=1e-9)
    parameter = dict(model.named_parameters())["blocks.0.attention.key.weight"]
    step = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for size in (1e-5, -1e-5):
        with torch.no_grad():
            parameter.add_(size * step)
            values.append(model(tokens, targets=tokens.roll(-1, 1)).losses["lm_loss"].item())
            parameter.sub_(size * step)
    slope = (values[0] - values[1]) / 2e-5
    model.zero_grad()
    model.losses.scale = 0.0  # the language-model loss alone
    model(tokens, targets=tokens.roll(-1, 1)).loss.backward()
    assert slope == pytest.approx((parameter.grad * step).sum().item(), rel=1e-6)
