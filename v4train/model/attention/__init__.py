"""Attention kinds by the word that names them in `model.attention_mix`."""

from v4train.model.attention.csa import CompressedSparseAttention
from v4train.model.attention.dsa import DeepSeekSparseAttention
from v4train.model.attention.gqa import GroupedQueryAttention
from v4train.model.attention.hca import HeavilyCompressedAttention
from v4train.model.attention.mla import MultiHeadLatentAttention
from v4train.model.attention.swa import SlidingWindowAttention
from v4train.model.mix import INDEXED_KINDS

KINDS = {
    "mha": GroupedQueryAttention,
    "mqa": GroupedQueryAttention,
    "gqa": GroupedQueryAttention,
    "mla": MultiHeadLatentAttention,
    "dsa": DeepSeekSparseAttention,
    "swa": SlidingWindowAttention,
    "csa": CompressedSparseAttention,
    "hca": HeavilyCompressedAttention,
}
INDEXED = tuple(KINDS[kind] for kind in INDEXED_KINDS)
