"""Text and what becomes of it: corpora, tokenizers, blocks, sentences, batches."""

from latentlm.data.builtin import FACTORS, GRAMMAR_SIZE, python_docs, render, sentences, stories
from latentlm.data.corpora import Annotated, Document, read_columns, read_documents
from latentlm.data.datasets import (
    Blocks,
    Collator,
    Item,
    Sentences,
    StreamedBlocks,
    collate,
    condition_of,
    length_buckets,
    split_documents,
    text_batch,
)
from latentlm.data.store import StoredTokens, store_tokens
from latentlm.data.tokenizers import load_tokenizer, token_bytes, train_tokenizer, train_word_tokenizer
from latentlm.data.tokens import Tokens

__all__ = [
    "FACTORS",
    "GRAMMAR_SIZE",
    "Annotated",
    "Blocks",
    "Collator",
    "Document",
    "Item",
    "Sentences",
    "StoredTokens",
    "StreamedBlocks",
    "Tokens",
    "collate",
    "condition_of",
    "length_buckets",
    "load_tokenizer",
    "python_docs",
    "read_columns",
    "read_documents",
    "render",
    "sentences",
    "split_documents",
    "store_tokens",
    "stories",
    "text_batch",
    "token_bytes",
    "train_tokenizer",
    "train_word_tokenizer",
]
