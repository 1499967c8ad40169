"""Formulas of what ranks send; tests/distributed/test_communication.py holds them to what is counted in a step."""

from dataclasses import replace

import pytest

from tests.models import tiny_config
from v4train.analysis.communication import BYTES, activation_bytes, gradient_bytes, muon_bytes
from v4train.analysis.work import Work
from v4train.model.mix import ATTENTION_KINDS

ONE = Work(sequence_length=64, rows=2)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_one_rank_sends_nothing(kind):
    assert not any(activation_bytes(tiny_config(f"{kind} {kind}"), ONE).values())
    assert gradient_bytes(1000, 1, 1) == muon_bytes(1000, 1, 4, 0) == 0


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline", "expert"])
def test_an_axis_sends_along_itself(kind, axis):
    work = replace(ONE, **{axis: 2}, **({"data": 2} if axis == "expert" else {}))
    sent = activation_bytes(tiny_config(f"{kind} {kind}"), work)
    assert [name for name, number in sent.items() if number] == [axis]
    twice = activation_bytes(tiny_config(f"{kind} {kind}"), replace(work, rows=4))
    assert twice[axis] == pytest.approx(2 * sent[axis], rel=0.01 if axis != "pipeline" else 0.3)
    assert activation_bytes(tiny_config(f"{kind} {kind}"), replace(work, recompute="block"))[axis] >= sent[axis]


def test_volumes_of_a_layer_by_hand():
    """A gqa layer with a dense FFN: two sums of [B, S, M] forward and backward; its keys and values to the others."""
    config = tiny_config("gqa gqa", ffn_mix="dense", mtp__num_layers=0, moe__num_hash_layers=0)
    shorter = tiny_config("gqa", num_layers=1, ffn_mix="dense", mtp__num_layers=0, moe__num_hash_layers=0)
    tokens, ranks = 2 * 64, 2

    def of_layer(axis):
        work = replace(ONE, **{axis: ranks})
        return activation_bytes(config, work)[axis] - activation_bytes(shorter, work)[axis]

    assert of_layer("tensor") == BYTES * 4 * 2 * (ranks - 1) * tokens * config.hidden_size
    gqa = config.attention.gqa
    keys_and_values = 2 * gqa.num_kv_heads * gqa.head_dim * tokens
    assert of_layer("context") == BYTES * 2 * (ranks - 1) * keys_and_values


def test_experts_send_what_is_not_here():
    config = tiny_config("swa swa", mtp__num_layers=0)
    work = replace(ONE, data=4, expert=4)
    rows = 4 * work.tokens * config.moe.top_k * 3 / 4
    expected = BYTES * 2 * 2 * rows * (2 * config.hidden_size + 1)  # two layers; forward and backward
    assert activation_bytes(config, work)["expert"] == pytest.approx(expected)
    assert activation_bytes(config, replace(work, expert=2))["expert"] == pytest.approx(expected * 2 / 3)


def test_parameters():
    assert gradient_bytes(1000, 4, 0) == 2 * 1000 * 3 * BYTES
    assert gradient_bytes(1000, 4, 1) == 3 * 1000 * 3 * BYTES
    assert muon_bytes(1000, 2, 4, 0) == 4 * muon_bytes(1000, 2, 4, 1) == 4 * 1000 * BYTES
    # ZeRO 3: parameters twice and gradients; Muon sums these everywhere, and gathers its matrices' four times
    assert gradient_bytes(1000, 4, 3, 2) == 2 * 3 * 1000 * 3 * BYTES
    assert gradient_bytes(1000, 4, 3, 2, matrices=900) == (2 * 4 * 1000 + 4 * 900) * 3 * BYTES
    assert gradient_bytes(1000, 4, 1, matrices=900) == gradient_bytes(1000, 4, 1)
