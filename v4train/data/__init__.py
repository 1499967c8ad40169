"""Text to micro-batches: sources -> tokenizer -> corpus -> packing -> loader."""

from v4train.data.corpus import Corpus, TokenizedDocuments, load_corpus, load_data
from v4train.data.loader import Batch, Loader
from v4train.data.sources import DataConfig, Document, Documents, check_data, find_documents
from v4train.data.statistics import target_bytes, target_counts, unigram_entropy
from v4train.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from v4train.data.validation import num_validation_rows, validation_batches

__all__ = [
    "Batch",
    "Corpus",
    "DataConfig",
    "Document",
    "Documents",
    "Loader",
    "TokenizedDocuments",
    "Tokenizer",
    "TokenizerConfig",
    "check_data",
    "find_documents",
    "load_corpus",
    "load_data",
    "load_tokenizer",
    "num_validation_rows",
    "target_bytes",
    "target_counts",
    "train_tokenizer",
    "unigram_entropy",
    "validation_batches",
]
