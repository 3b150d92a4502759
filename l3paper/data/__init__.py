"""From text to batches: documents, a tokenizer, streams of token ids, and batches cut from them."""

from l3paper.data.corpus import Document, read_documents, split_documents
from l3paper.data.streams import TokenizedCorpus, load_corpus, training_batch, validation_batches

__all__ = [
    "Document",
    "TokenizedCorpus",
    "load_corpus",
    "read_documents",
    "split_documents",
    "training_batch",
    "validation_batches",
]
