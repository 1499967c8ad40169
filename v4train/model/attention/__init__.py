"""Attention kinds by the word that names them in `model.attention_mix`."""

from v4train.model.attention.csa import CompressedSparseAttention
from v4train.model.attention.hca import HeavilyCompressedAttention
from v4train.model.attention.swa import SlidingWindowAttention

KINDS = {
    "swa": SlidingWindowAttention,
    "csa": CompressedSparseAttention,
    "hca": HeavilyCompressedAttention,
}
