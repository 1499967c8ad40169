"""Text to micro-batches: sources -> tokenizer -> documents -> packing -> lanes -> loader."""

from v4train.data.config import DataConfig, SourceConfig
from v4train.data.corpus import Corpus, Source, TokenizedDocuments, check_data, load_data
from v4train.data.loader import Batch, BatchConfig, EndOfData, Loader, check_position, merged_states
from v4train.data.problems import DataError
from v4train.data.sources import Document, Documents, find_documents
from v4train.data.statistics import target_bytes, target_counts, unigram_entropy
from v4train.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from v4train.data.validation import num_validation_rows, validation_batches

__all__ = [
    "Batch",
    "BatchConfig",
    "Corpus",
    "DataConfig",
    "DataError",
    "Document",
    "Documents",
    "EndOfData",
    "Loader",
    "Source",
    "SourceConfig",
    "TokenizedDocuments",
    "Tokenizer",
    "TokenizerConfig",
    "check_data",
    "check_position",
    "find_documents",
    "load_data",
    "merged_states",
    "num_validation_rows",
    "target_bytes",
    "target_counts",
    "train_tokenizer",
    "unigram_entropy",
    "validation_batches",
]
