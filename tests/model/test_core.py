"""The joint softmax against a twin with dense [S, S + N] matrices and the sink as one more column."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.model.memory import LargestTensor
from tests.model.packings import ids_of, layouts, same_document, visible_entries
from v4train.model.attention import core, softmax
from v4train.model.attention.core import Entries, IndexUse, Local, attend
from v4train.model.attention.selection import index_scores, indexer_kl, score_gradients, select_top_k, selection_mask
from v4train.model.documents import compression_blocks, document_starts

WINDOW, RATIO, TOP_K = 6, 4, 2
LAYOUTS = [[23, -2, 9, 3], [1, 30, -6]]


def naive_scores(query, keys, head_weight):
    """sum_h w_h ReLU(q_h . k_s), one product at a time."""
    scores = query.new_zeros(*query.shape[:2], keys.shape[1])
    for b, t, h in torch.cartesian_prod(*[torch.arange(n) for n in query.shape[:3]]).tolist():
        for s in range(keys.shape[1]):
            scores[b, t, s] = scores[b, t, s] + head_weight[b, t, h] * (query[b, t, h] @ keys[b, s]).clamp(min=0)
    return scores


def naive_selection(scores, visible, top_k):
    """The best `top_k` of each query's visible entries, equal scores by the lower index."""
    chosen = torch.zeros_like(visible)
    for b, t in torch.cartesian_prod(torch.arange(scores.shape[0]), torch.arange(scores.shape[1])).tolist():
        ranked = sorted(visible[b, t].nonzero().flatten().tolist(), key=lambda s: (-scores[b, t, s].item(), s))
        chosen[b, t, ranked[:top_k]] = True
    return chosen


def naive_kl(scores, attended, probabilities):
    """Sum over queries of KL(teacher || student), each over its own short list of entries."""
    total = scores.new_zeros(())
    for b, t in torch.cartesian_prod(torch.arange(scores.shape[0]), torch.arange(scores.shape[1])).tolist():
        entries = attended[b, t].nonzero().flatten()
        if len(entries):
            teacher = probabilities[b, t, entries].detach()
            teacher = teacher / teacher.sum()
            student = scores[b, t, entries].softmax(0)
            total = total + (teacher * (teacher / student).log()).sum()
    return total


def naive_attention(query, kv, sink, ids, window, entries=None, attended=None):
    """Output [B, S, H, D] and the probabilities of the entries, summed over heads, [B, S, N]."""
    length = query.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = same_document(ids) & (distance >= 0) & (distance < window)
    keys = kv
    if entries is not None:
        keys, seen = torch.cat([kv, entries], 1), torch.cat([seen, attended], 2)
    logits = torch.einsum("bshd,bkd->bshk", query, keys) / query.shape[-1] ** 0.5
    logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
    column = sink[:, None].expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("bshk,bkd->bshd", weights, keys), weights[..., length:].sum(2)


class Case:
    """Random inputs of one packed batch, fp64 with gradients."""

    def __init__(self, *rows, entries=True, dtype=torch.float64, heads=3, dim=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = ids_of(*rows)
        batch, length = self.ids.shape
        slots = length // RATIO

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

        self.query, self.kv, self.sink = random(batch, length, heads, dim), random(batch, length, dim), random(heads)
        self.entries = random(batch, slots, dim) if entries else None
        self.index = [random(batch, length, 2, 3), random(batch, slots, 3), random(batch, length, 2)]
        self.starts, self.blocks = document_starts(self.ids), compression_blocks(self.ids, RATIO)
        self.visible = visible_entries(self.ids, RATIO)

    def attend(self, chunk, select=False, with_loss=False):
        indexed = select or with_loss
        scored, index = (self.index, IndexUse(TOP_K, select, with_loss)) if indexed else (None, None)
        entries = None if self.entries is None else Entries(self.entries[:, None], None, self.blocks)
        local = Local(self.kv[:, None], None, self.starts, WINDOW)
        options = {"local": local, "entries": entries, "sink": self.sink, "scored": scored, "index": index}
        return attend(self.query, **options, chunk=chunk)[:2]

    def naive(self, select=False, with_loss=False):
        attended = self.visible
        scores = naive_scores(*self.index) if select or with_loss else None
        if select:
            attended = naive_selection(scores, attended, TOP_K)
        output, probabilities = naive_attention(
            self.query, self.kv, self.sink, self.ids, WINDOW, self.entries, attended
        )
        return output, naive_kl(scores, attended, probabilities) if with_loss else output.new_zeros(())

    def gradients(self, output, kl):
        """Of a random linear function of the output, plus twice the KL."""
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=output.dtype)
        inputs = [self.query, self.kv, self.sink, *([] if self.entries is None else [self.entries]), *self.index]
        gradients = torch.autograd.grad((output * weight).sum() + 2 * kl, inputs, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]


MODES = {
    "window only": (False, {}),
    "all entries": (True, {}),
    "top-k": (True, {"select": True}),
    "top-k with loss": (True, {"select": True, "with_loss": True}),
    "all entries with loss": (True, {"with_loss": True}),
}


@pytest.mark.parametrize("held", [0, 5000, softmax.HELD], ids=["fused", "entries plain", "plain"])
@pytest.mark.parametrize("gather_from", [0, core.GATHER_FROM])
@pytest.mark.parametrize("chunk", [3, 16, 100])
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients_of_the_dense_twin(mode, chunk, gather_from, held, monkeypatch):
    monkeypatch.setattr(softmax, "HELD", held)
    monkeypatch.setattr(core, "GATHER_FROM", gather_from)
    entries, options = MODES[mode]
    case = Case(*LAYOUTS, entries=entries)
    ours, theirs = case.attend(chunk, **options), case.naive(**options)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)
    assert (ours[1] > 0.1) == options.get("with_loss", False)
    gradients = zip(case.gradients(*ours), case.gradients(*theirs), strict=True)
    for mine, other in gradients:
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


def test_chunks_without_a_query_whose_recall_is_measured(monkeypatch):
    monkeypatch.setattr(core, "MEASURED_ENTRIES", 1)
    case = Case(*LAYOUTS)
    for ours, theirs in zip(case.attend(3, True, True), case.naive(True, True), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("chunk", [16, 100], ids=["computed again", "kept"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_bf16_inputs_have_logits_and_sums_in_fp32(key_heads, chunk):
    """Against fp64 on the same rounded numbers; logits up to 60, of which bf16 would round to 0.25."""
    generator, heads, length, dim = torch.Generator().manual_seed(0), 4, 40, 16

    def random(*shape, scale=1.0):
        made = scale * torch.randn(*shape, generator=generator)
        return made.bfloat16().requires_grad_()

    inputs = (
        random(2, length, heads, dim, scale=12.0),
        random(2, key_heads, length, dim),
        random(2, key_heads, length, 8),
    )
    weight = random(2, length, heads, 8).detach()
    starts = torch.zeros(2, length, dtype=torch.long)
    output = attend(inputs[0], local=Local(*inputs[1:], starts, WINDOW), chunk=chunk).output
    ours = [output, *torch.autograd.grad((output * weight).sum(), inputs)]
    query, keys, values = wide = [x.detach().double().requires_grad_() for x in inputs]
    keys, values = (x.repeat_interleave(heads // key_heads, 1) for x in (keys, values))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    logits = torch.einsum("bshd,bhkd->bhsk", query, keys) / dim**0.5
    logits = logits.masked_fill((distance < 0) | (distance >= WINDOW), -torch.inf)
    assert logits[logits.isfinite()].abs().max() > 50
    expected = torch.einsum("bhsk,bhke->bshe", logits.softmax(-1), values)
    expected = [expected, *torch.autograd.grad((expected * weight.double()).sum(), wide)]
    for one, other in zip(ours, expected, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 0.01, error


def test_nothing_waits_for_the_garbage_collector(monkeypatch):
    """Keys, masks and weights of a chunk, and the query that they come from, are freed when the chunk is done."""
    alive = []
    for kind in ("Tokens", "Window", "InReach", "Gathered"):
        original = getattr(core, kind)

        def made(*arguments, original=original):
            part = original(*arguments)
            alive.append(weakref.ref(part))
            return part

        monkeypatch.setattr(core, kind, made)
    gc.disable()
    try:
        for gather_from in (0, 4):
            monkeypatch.setattr(core, "GATHER_FROM", gather_from)
            case = Case(*LAYOUTS)
            for chunk in (3, 16):
                output, kl = case.attend(chunk, True, True)
                (output.sum() + kl).backward()
    finally:
        gc.enable()
    assert len(alive) > 20 and not any(reference() for reference in alive)


@settings(max_examples=15)
@given(layout=layouts, seed=st.integers(0, 1000))
def test_any_packing(layout, seed):
    case = Case(layout, seed=seed, heads=2)
    with torch.no_grad():
        ours, theirs = (run(select=True, with_loss=True) for run in (lambda **o: case.attend(7, **o), case.naive))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_fp32_result_does_not_depend_on_the_chunk_and_repeats_bitwise():
    case = Case(*LAYOUTS, dtype=torch.float32)
    runs = {}
    for chunk in (1, 5, 16, 38, 100):
        results = [case.attend(chunk, True, True) for _ in range(2)]
        runs[chunk], again = ([*result, *case.gradients(*result)] for result in results)
        for one, two in zip(runs[chunk], again, strict=True):
            assert torch.equal(one, two)
    for chunk in runs:
        for one, two in zip(runs[chunk], runs[100], strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(runs[chunk][0], runs[100][0], atol=1e-6, rtol=0)


def test_padding_sees_itself_alone():
    case = Case([5, -3])
    output, _ = case.attend(4)
    for position in (5, 6, 7):
        own = torch.einsum("hd,d->h", case.query[0, position], case.kv[0, position]) / 2
        weight = own.exp() / (own.exp() + case.sink.exp())
        torch.testing.assert_close(output[0, position], weight[:, None] * case.kv[0, position])


@pytest.mark.parametrize("select", [False, True])
def test_memory_is_linear_in_the_sequence(select):
    """Nothing saved or made has the size of [S, S]; what is saved for backward grows as S does."""
    chunk, heads, dim, saved = 16, 3, 4, {}
    for length in (512, 1024):
        case = Case([length], dtype=torch.float32, heads=heads, dim=dim)
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
        )
        with LargestTensor() as largest:
            with hooks:
                output, kl = case.attend(chunk, select, True)
            (output.sum() + kl).backward()
        inputs = max(x.numel() for x in (case.query, case.index[0]))
        assert max(sizes) <= inputs
        assert largest.elements <= max(inputs, chunk * heads * (WINDOW + chunk + length // RATIO))
        assert largest.elements < length * length / 20
        assert case.query.grad.abs().sum() > 0
        saved[length] = sum(sizes)
    assert saved[1024] <= 2 * saved[512] + heads


def test_recomputation_frees_what_attention_was_given():
    """Under activation checkpointing the inputs die with the forward pass: nothing may hold them past it."""
    case, alive = Case([64], dtype=torch.float32), []

    def attention(query, kv, entries, *index):
        made = [x * 1 for x in (query, kv, entries, *index)]
        alive[:] = [weakref.ref(x) for x in made]
        local = Local(made[1][:, None], None, case.starts, WINDOW)
        entries, index = Entries(made[2][:, None], None, case.blocks), IndexUse(TOP_K, True, True)
        options = {"local": local, "entries": entries, "sink": case.sink, "scored": made[3:], "index": index}
        return attend(made[0], **options, chunk=16)[:2]

    output, kl = checkpoint(attention, case.query, case.kv, case.entries, *case.index, use_reentrant=False)
    gc.collect()
    names = ["query", "kv", "entries", "index query", "index keys", "index head weight"]
    assert [name for name, reference in zip(names, alive, strict=True) if reference() is not None] == []
    (output.sum() + kl).backward()
    assert case.index[0].grad.abs().sum() > 0


@settings(max_examples=60)
@given(data=st.data())
def test_ties_go_to_the_lower_index(data):
    entries, top_k = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    row = st.lists(st.integers(-2, 2), min_size=entries, max_size=entries)
    scores = torch.tensor([data.draw(st.lists(row, min_size=3, max_size=3))]).float()
    shown = st.lists(st.booleans(), min_size=entries, max_size=entries)
    visible = torch.tensor([data.draw(st.lists(shown, min_size=3, max_size=3))])
    mask = selection_mask(select_top_k(scores, visible, top_k), entries)
    assert torch.equal(mask, naive_selection(scores, visible, top_k))


def test_a_named_tie():
    """Of four equal scores two are wanted: the first two visible ones."""
    scores = torch.tensor([[[0.0, 3.0, 0.0, 0.0, 0.0]]])
    visible = torch.tensor([[[False, True, True, True, True]]])
    assert sorted(select_top_k(scores, visible, 3)[0, 0].tolist()) == [1, 2, 3]


def test_index_scores():
    query, keys, head_weight = Case([13]).index
    ours, theirs = index_scores(query, keys, head_weight), naive_scores(query, keys, head_weight)
    torch.testing.assert_close(ours.scores, theirs)
    gradient = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=theirs.dtype)
    expected = torch.autograd.grad(theirs, (query, keys, head_weight), gradient)
    for one, other in zip(score_gradients(ours, gradient), expected, strict=True):
        torch.testing.assert_close(one, other)


def kl_inputs():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    attended = torch.rand(2, 4, 5, generator=generator) < 0.6
    attended[0, 1] = False
    attended[1, 2] = torch.tensor([False, False, True, False, False])
    probabilities = torch.rand(2, 4, 5, generator=generator, dtype=torch.float64) * attended
    return scores, attended, probabilities.requires_grad_()


def test_kl_and_its_gradient():
    scores, attended, probabilities = kl_inputs()
    (ours, uniform, gradient), theirs = indexer_kl(*kl_inputs()), naive_kl(scores, attended, probabilities)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(uniform, naive_kl(scores * 0, attended, probabilities), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, scores)[0], atol=1e-12, rtol=0)
    assert gradient[0, 1].abs().sum() == 0 and gradient[1, 2].abs().sum() == 0  # nothing attended; one entry: KL 0


def test_kl_of_queries_with_nothing_visible_is_zero():
    scores, attended, probabilities = kl_inputs()
    nothing = torch.zeros_like(attended)
    assert [x.abs().sum() for x in indexer_kl(scores, nothing, probabilities * 0)] == [0, 0, 0]


def test_kl_with_a_teacher_that_underflows_is_finite():
    scores, attended, probabilities = kl_inputs()
    kl, uniform, gradient = indexer_kl(scores.float(), attended, probabilities.float() * 0)
    assert kl == uniform == 0 and gradient.isfinite().all()
