"""Tokenised documents, configurations and streams of them, for tests of packing, lanes and the loader."""

from dataclasses import fields

import numpy as np

from v4train.data.config import DataConfig, SourceConfig
from v4train.data.corpus import Source, TokenizedDocuments
from v4train.data.streams import IndexedStream, Lane

FIRST = 10  # smaller ids are special tokens
IGNORED = -100


def documents_of(lengths, first=FIRST):
    """Every token differs from every other: token t of them all is `first` + t."""
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return TokenizedDocuments(np.arange(first, first + offsets[-1], dtype=np.uint32), offsets)


def indexed_source(name, documents, epochs=None):
    """Source of documents in memory; they are its validation documents too."""

    def stream(lane: Lane) -> IndexedStream:
        return IndexedStream(documents, lane, epochs)

    sizes = documents.num_tokens, documents.num_documents
    return Source(name, stream, documents, *sizes, f"fingerprint of {name} {sizes}")


def data_config(**others) -> DataConfig:
    """As conf/data/_data.yaml has it, small documents only."""
    own = {"source": "text", "path": None, "name": None, "split": "train", "column": "text", "epochs": None}
    own |= {"validation_fraction": 0.2, "on_error": "error", "retries": 0, "max_document_bytes": 1000, "verify": True}
    own |= {"recall": None}
    assert own.keys() == {field.name for field in fields(SourceConfig)}
    own |= {"sources": None, "weights": None, "when_dry": "stop", "packing": "best_fit", "fim_rate": 0.0}
    return DataConfig(**own | {"lanes": None, "workers": 0} | others)


def assert_every_token_once(rows, documents):
    """Of an epoch's rows: each token once an input, each that isn't its document's first once a target."""
    inputs = np.concatenate([row.input_ids[row.document_ids >= 0] for row in rows])
    targets = np.concatenate([row.targets for row in rows])
    assert sorted(inputs.tolist()) == documents.flat.tolist()
    firsts = set(documents.flat[documents.offsets[:-1]].tolist())
    assert sorted(targets[targets != IGNORED].tolist()) == [t for t in documents.flat.tolist() if t not in firsts]
    for row in rows:  # a target follows its token, and no other token has a part in it
        has = row.targets != IGNORED
        assert (row.targets[has] == row.input_ids[has] + 1).all() and (row.document_ids[has] >= 0).all()
