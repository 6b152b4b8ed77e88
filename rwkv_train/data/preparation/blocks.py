"""Tokenize a block of raw records: what the workers do, and all that they send back."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.data.preparation.signatures import Signatures, signatures_of
from rwkv_train.data.preparation.stored_documents import RECORD_DTYPE
from rwkv_train.data.preparation.windows import count_words
from rwkv_train.data.sources.base import BadRecord, Block, Document
from rwkv_train.data.sources.domains import DomainChoice
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.tokenizers.base import TokenArray, Tokenizer, TokenizerIdentity, token_dtype

MAX_TOKENS = (1 << 31) - 1
"""Tokens of one document that the .idx format can tell of."""

N_BAD_KEPT = 5
"""Bad records of which file and line are kept."""

_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 1 << 13  # tokenized at once


class TokenizedBlock(NamedTuple):
    """The documents of a block."""

    tokens: TokenArray
    """All ids, one document after another, each followed by its end token."""
    records: npt.NDArray[np.void]
    """``RECORD_DTYPE``, ``[n]``; tokens and domains are counted within the block."""
    domains: tuple[str, ...]
    """In the order of their first documents."""
    signatures: Signatures | None
    """``[n, 128]``, where near duplicates are looked for."""
    n_empty: int
    """Documents without text."""
    n_bad: int
    first_bad: tuple[BadRecord, ...]
    """The first ``N_BAD_KEPT`` of them."""
    left_out: dict[str, int]
    """Documents of domains that are not wanted, by domain."""
    n_source_bytes: int
    """Bytes of the source, as stored."""


class BlockTokenizer:
    """Makes documents of raw records and tokens of documents.

    Args:
        tokenizer: what cuts the texts.
        domains: those that are wanted; ``None``: all.
        with_signatures: compute what near duplicates are found by.
    """

    def __init__(self, tokenizer: Tokenizer, domains: tuple[str, ...] | None, with_signatures: bool) -> None:
        self._tokenizer = tokenizer
        self._domains = domains
        self._with_signatures = with_signatures
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end: TokenArray = np.array([tokenizer.end_of_document], dtype=self._dtype)

    def __call__(self, block: Block) -> TokenizedBlock:
        """Parse, check, tokenize and hash a block.

        Raises:
            DataError: what the block points to cannot be read, or a document is too long for the format.
        """
        rest, choice = _Rest(), DomainChoice(self._domains)
        pieces: list[TokenArray] = []
        rows: list[npt.NDArray[np.void]] = []
        signatures: list[Signatures] = []
        domains: dict[str, int] = {}
        for batch in _batches(block, choice, rest):
            data = [document.text.encode() for document in batch]
            tokens = self._tokenizer.encode_arrays([document.text for document in batch])
            for ids in tokens:
                pieces += [ids, self._end]
            records = np.zeros(len(batch), RECORD_DTYPE)
            records["n_tokens"] = [_checked_length(len(ids) + 1) for ids in tokens]
            records["n_bytes"] = [len(text) for text in data]
            records["n_words"] = [
                count_words(document.text, text) for document, text in zip(batch, data, strict=True)
            ]
            hashes = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in data)
            records["hash"] = np.frombuffer(hashes, "<u8").reshape(-1, 2)
            records["domain"] = [domains.setdefault(document.domain, len(domains)) for document in batch]
            rows.append(records)
            if self._with_signatures:
                signatures.append(signatures_of(data))
        records = np.concatenate([np.empty(0, RECORD_DTYPE), *rows])
        records["first_token"] = np.cumsum(records["n_tokens"]) - records["n_tokens"]
        return TokenizedBlock(
            tokens=np.concatenate([np.empty(0, self._dtype), *pieces]),
            records=records,
            domains=tuple(domains),
            signatures=np.concatenate([signatures_of([]), *signatures]) if self._with_signatures else None,
            n_empty=rest.n_empty,
            n_bad=len(rest.bad),
            first_bad=tuple(rest.bad[:N_BAD_KEPT]),
            left_out=dict(choice.left_out),
            n_source_bytes=block.n_bytes,
        )


def load_block_tokenizer(
    identity: TokenizerIdentity, domains: tuple[str, ...] | None, with_signatures: bool
) -> Callable[[Block], TokenizedBlock]:
    """Make a :class:`BlockTokenizer` in another process.

    Raises:
        DataError: the tokenizer's file has changed since this process read it.
    """
    tokenizer = load_tokenizer(identity.name)
    if not tokenizer.identity.matches(identity):
        raise DataError(f"the tokenizer {identity.name} was changed while the data were prepared")
    return BlockTokenizer(tokenizer, domains, with_signatures)


@dataclass
class _Rest:
    """What a block holds beside documents to tokenize."""

    bad: list[BadRecord] = field(default_factory=list)
    n_empty: int = 0


def _batches(block: Block, choice: DomainChoice, rest: _Rest) -> Iterator[list[Document]]:
    """Group documents for the tokenizers' batch encoding."""
    batch: list[Document] = []
    n_characters = 0
    for record in block.records():
        if isinstance(record, BadRecord):
            rest.bad.append(record)
        elif not choice.keeps(record.domain):
            continue
        elif not record.text:
            rest.n_empty += 1
        else:
            batch.append(record)
            n_characters += len(record.text)
            if n_characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
                yield batch
                batch, n_characters = [], 0
    if batch:
        yield batch


def _checked_length(n_tokens: int) -> int:
    if n_tokens > MAX_TOKENS:
        raise DataError(f"a document has {n_tokens} tokens; the .idx format ends at {MAX_TOKENS}: divide it")
    return n_tokens
