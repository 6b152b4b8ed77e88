"""A tokenized corpus read as text again: its tokens are decoded by the tokenizer that made them."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from rwkv_train.data.binidx import add_suffix
from rwkv_train.data.sources.base import (
    BLOCK_BYTES,
    MAX_RECORD_BYTES,
    BadRecord,
    Block,
    Document,
    Record,
    Source,
    SourceIdentity,
    SourceOptions,
    hash_file,
    show_path,
)
from rwkv_train.data.sources.values import decode
from rwkv_train.data.stored import load_corpus
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import Tokenizer, load_tokenizer
from rwkv_train.tokenizers.base import TokenArray

_MAX_RECORD_TOKENS = MAX_RECORD_BYTES // 4
_DECODED_AT_ONCE = 1 << 16


class PairSource(Source):
    """A ``.bin/.idx`` pair; documents are counted from 0, as in its index.

    Args:
        path: its prefix, its ``.bin`` or its ``.idx``.
        options: the tokenizer of a pair without a sidecar that names it.

    Raises:
        DataError: a file is missing or damaged, or the tokenizer is not known or another one.
    """

    uses = frozenset({"format", "pair_tokenizer"})

    def __init__(self, path: Path, options: SourceOptions) -> None:
        prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        self._corpus = load_corpus(prefix)
        self.name = show_path(prefix)
        self.n_bytes = self._corpus.tokens.tokens.nbytes
        sidecar = self._corpus.sidecar
        name = options.pair_tokenizer or (sidecar.tokenizer.name if sidecar else None)
        if name is None:
            raise DataError(
                f"{prefix} has no sidecar ({add_suffix(prefix, '.json')}) that tells which tokenizer made it: name it "
                "with --pair-tokenizer"
            )
        tokenizer = _tokenizer(name)
        if sidecar:
            self._corpus.require_tokenizer(tokenizer.identity)
        self._tokenizer = name
        self._end_of_document = tokenizer.end_of_document

    def describe(self) -> SourceIdentity:
        """Return the prefix, and size and hash of the .bin file."""
        return SourceIdentity(
            self.name, self.n_bytes or 0, hash_file(add_suffix(self._corpus.prefix, ".bin"))
        )

    def files(self) -> Sequence[Path]:
        """Return the pair, and what lies beside it if we made it."""
        suffixes = (".bin", ".idx", ".json", ".docs.npy") if self._corpus.sidecar else (".bin", ".idx")
        return [add_suffix(self._corpus.prefix, suffix) for suffix in suffixes]

    def _cut(self) -> Iterator[Block]:
        documents: list[PairDocument] = []
        n_bytes = 0
        for number in range(self._corpus.tokens.n_documents):
            tokens, domain, _ = self._corpus.token_document(number, self._end_of_document)
            documents.append(PairDocument(number, tokens[: _MAX_RECORD_TOKENS + 1], domain))
            start, end = self._corpus.tokens.document_span(number)
            n_bytes += (end - start) * tokens.itemsize
            if n_bytes >= BLOCK_BYTES // 2:  # tokens are a half or less of the text
                yield self._block(documents, n_bytes)
                documents, n_bytes = [], 0
        if documents:
            yield self._block(documents, n_bytes)

    def _block(self, documents: "list[PairDocument]", n_bytes: int) -> Block:
        copied = (document._replace(tokens=document.tokens.copy()) for document in documents)
        return PairBlock(self.name, tuple(copied), self._tokenizer, n_bytes)


class PairDocument(NamedTuple):
    """The tokens of a document, without its end token."""

    number: int
    tokens: TokenArray
    domain: str


class PairBlock(NamedTuple):
    """Documents to decode."""

    name: str
    documents: tuple[PairDocument, ...]
    tokenizer: str
    n_bytes: int

    def records(self) -> Iterator[Document | BadRecord]:
        """Yield each document whose tokens are text."""
        tokenizer = _tokenizer(self.tokenizer)
        for document in self.documents:
            try:
                yield Document(_decode(document.tokens, tokenizer), document.domain)
            except DataError as error:
                yield BadRecord(f"{self.name}, document {document.number}", str(error))

    def whole_records(self) -> Iterator[Record | BadRecord]:
        """Yield each document as a record with the one field "text"."""
        for document, record in zip(self.documents, self.records(), strict=True):
            if isinstance(record, BadRecord):
                yield record
            else:
                yield Record(f"{self.name}, document {document.number}", {"text": record.text})


@lru_cache(maxsize=2)
def _tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(name)


def _decode(tokens: TokenArray, tokenizer: Tokenizer) -> str:
    if len(tokens) > _MAX_RECORD_TOKENS:
        raise DataError(f"it has more than {_MAX_RECORD_TOKENS} tokens; a document can have so many at most")
    if (tokens == tokenizer.end_of_document).any():
        raise DataError(
            f"it holds the token {tokenizer.end_of_document}, which ends a document, before its end: several "
            "documents were written as one"
        )
    pieces = (tokens[at : at + _DECODED_AT_ONCE].tolist() for at in range(0, len(tokens), _DECODED_AT_ONCE))
    return decode(b"".join(tokenizer.decode_bytes(piece) for piece in pieces))
