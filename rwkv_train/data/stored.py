"""A tokenized corpus on disk, and whether it fits a run."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.data.binidx import TokenFile, add_suffix
from rwkv_train.data.sidecar import Sidecar, read_document_table
from rwkv_train.data.sources.base import UNKNOWN_DOMAIN
from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import TokenArray, TokenizerIdentity

logger = logging.getLogger(__name__)

FOREIGN_END_OF_DOCUMENT = 0
"""End token of a pair without a sidecar where the caller knows none: the World and the NeoX tokenizer both have 0."""

_SCAN_TOKENS = 1 << 20  # looked at at once
_MAX_SCANNED_TOKENS = 1 << 30  # a few seconds
_MAX_CHECKED_DOCUMENTS = 1 << 16
_SUMMED_DOCUMENTS = 1 << 20  # at once


class TokenDocument(NamedTuple):
    """One tokenized document, without its end token."""

    tokens: TokenArray
    """Token ids, ``[n]``, of the type on disk."""
    domain: str
    n_bytes: int
    """Length of its text in UTF-8; 0 in a corpus without a sidecar, where it is not known."""


class Corpus:
    """A tokenized corpus: the tokens and, where it was prepared here, what is known about them.

    Args:
        tokens: the ``.bin/.idx`` pair.
        sidecar: ``None`` for a pair that another program made.
        documents: domain and bytes of each document (``DOCUMENT_DTYPE``), or ``None`` likewise.
    """

    def __init__(
        self, tokens: TokenFile, sidecar: Sidecar | None, documents: npt.NDArray[np.void] | None
    ) -> None:
        self.tokens = tokens
        self.sidecar = sidecar
        self.documents = documents

    def __reduce__(self) -> tuple[Callable[[Path], "Corpus"], tuple[Path]]:
        return (_load, (self.prefix,))

    @property
    def prefix(self) -> Path:
        """Path of the files without their endings."""
        return self.tokens.prefix

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of the indices in ``documents``."""
        if self.sidecar is None:
            return (UNKNOWN_DOMAIN,)
        return tuple(domain.name for domain in self.sidecar.domains)

    def tokens_by_domain(self) -> dict[str, int]:
        """Return the number of tokens of each domain, end tokens included."""
        if self.sidecar is None:
            return {UNKNOWN_DOMAIN: self.tokens.n_tokens}
        return {domain.name: domain.n_tokens for domain in self.sidecar.domains}

    def token_document(self, index: int, end_of_document: int = FOREIGN_END_OF_DOCUMENT) -> TokenDocument:
        """Return a document; its tokens are a view of the file.

        Args:
            index: of the document.
            end_of_document: the end token of the tokenizer, for a pair whose sidecar does not tell.

        Raises:
            DataError: the document has an id that the corpus did not have when it was prepared.
        """
        tokens = self.tokens.document(index)
        self._require_prepared(index, tokens)
        # Another token at the end is text: GPT-2's 0 is "!".
        end_token = self.sidecar.end_of_document if self.sidecar else end_of_document
        if len(tokens) and tokens[-1] == end_token:
            tokens = tokens[:-1]
        if self.documents is None:
            return TokenDocument(tokens, UNKNOWN_DOMAIN, 0)
        record = self.documents[index]
        return TokenDocument(tokens, self.domains[record["domain"]], int(record["n_bytes"]))

    def token_documents(self, end_of_document: int = FOREIGN_END_OF_DOCUMENT) -> Iterator[TokenDocument]:
        """Yield the documents in the order on disk; ``end_of_document`` as in :meth:`token_document`."""
        return (self.token_document(index, end_of_document) for index in range(self.tokens.n_documents))

    def require_tokenizer(self, identity: TokenizerIdentity) -> None:
        """Refuse a corpus of another tokenizer; warn if nothing tells which one made it."""
        if self.sidecar is None:
            logger.warning(
                "%s has no sidecar: whether the tokenizer '%s' made it cannot be checked",
                self.prefix,
                identity.name,
            )
        elif not self.sidecar.tokenizer.matches(identity):
            found = self.sidecar.tokenizer
            raise DataError(
                f"{self.prefix} was made with the tokenizer '{found.name}' ({found.sha256[:12]}), wanted "
                f"'{identity.name}' ({identity.sha256[:12]}): use that tokenizer, or prepare the data again"
            )

    def require_vocab(self, vocab_size: int) -> None:
        """Refuse a corpus with ids that a model of this vocabulary does not have.

        Without a sidecar the ids themselves are looked at: all of them, or evenly spread 2**30 of a larger
        corpus.
        """
        lowest, highest = (0, self.sidecar.max_token) if self.sidecar else self._scan(vocab_size)
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise DataError(
                f"{self.prefix} holds the token id {wrong}, but the model's ids are 0 to {vocab_size - 1} "
                f"(vocab_size {vocab_size})"
            )

    def require_end_tokens(self, end_of_document: int) -> None:
        """Refuse a corpus whose documents do not end with the token that tells one from the next.

        The last tokens of evenly spread 2**16 documents are looked at, or of all where there are fewer.
        """
        n_documents = self.tokens.n_documents
        for number in np.linspace(0, n_documents - 1, min(n_documents, _MAX_CHECKED_DOCUMENTS)).astype(int):
            document = self.tokens.document(int(number))
            if len(document) == 0 or document[-1] != end_of_document:
                found = f"with the token {document[-1]}" if len(document) else "without any token"
                raise DataError(
                    f"{self.prefix}: document {number} ends {found}, but data.documents 'reset' needs each to end with "
                    f"the tokenizer's end token {end_of_document}: prepare the corpus with it, or set data.documents "
                    "to 'stream'"
                )

    def identify(self) -> dict[str, object]:
        """Return what a resumed run recognises its corpus by, wherever it lies then: JSON's types."""
        return {
            "tokens": self.tokens.n_tokens,
            "sha256": None if self.sidecar is None else self.sidecar.sha256,
        }

    def require_length(self, ctx_len: int) -> None:
        """Refuse a corpus that is shorter than one sample."""
        if self.tokens.n_tokens < ctx_len + 1:
            raise DataError(
                f"{self.prefix} has {self.tokens.n_tokens} tokens, one sample needs {ctx_len + 1} "
                f"(ctx_len {ctx_len} and the token after it): take more text or a smaller ctx_len"
            )

    def _require_prepared(self, index: int, tokens: TokenArray) -> None:
        """Refuse a changed file by its name, which a model or a tokenizer that meets the id does not know."""
        if self.sidecar is None or len(tokens) == 0:
            return
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest > self.sidecar.max_token:
            wrong = lowest if lowest < 0 else highest
            raise DataError(
                f"{add_suffix(self.prefix, '.bin')}: document {index} has the token id {wrong}, but "
                f"{add_suffix(self.prefix, '.json')} tells of ids up to {self.sidecar.max_token}: the file was changed "
                "or damaged after it was prepared; prepare it again"
            )

    def _scan(self, vocab_size: int) -> tuple[int, int]:
        """Return the lowest and the highest id."""
        limits = np.iinfo(self.tokens.dtype)
        if limits.min == 0 and limits.max < vocab_size:
            return 0, limits.max
        tokens = self.tokens.tokens
        n_chunks = -(-len(tokens) // _SCAN_TOKENS)
        n_scanned = min(n_chunks, _MAX_SCANNED_TOKENS // _SCAN_TOKENS)
        lowest, highest = 0, 0
        for number in range(n_scanned):
            start = number * n_chunks // n_scanned * _SCAN_TOKENS
            chunk = tokens[start : start + _SCAN_TOKENS]
            lowest, highest = min(lowest, int(chunk.min())), max(highest, int(chunk.max()))
        return lowest, highest


def load_corpus(prefix: Path) -> Corpus:
    """Open a tokenized corpus, memory-mapped.

    A ``.bin/.idx`` pair without ``PREFIX.json`` (made by another program) opens too; its documents are of the
    domain "unknown".

    Args:
        prefix: path of the files without their endings.

    Raises:
        DataError: a file is missing, damaged, or not of the same corpus as the others.
    """
    corpus = _load(prefix)
    if corpus.sidecar is not None and corpus.documents is not None:
        _require_totals(prefix, corpus.sidecar, corpus.documents)
    return corpus


def _load(prefix: Path) -> Corpus:
    """Open a corpus without a look at its documents, as a process does whose parent has looked."""
    tokens = TokenFile.open(prefix)
    path = add_suffix(prefix, ".json")
    if not path.exists():
        return Corpus(tokens, None, None)
    sidecar = Sidecar.from_json(_read(path), str(path))
    documents = read_document_table(str(add_suffix(prefix, ".docs.npy")))
    told = f"{sidecar.n_tokens} tokens of {sidecar.dtype} in {sidecar.n_documents} documents"
    found = f"{tokens.n_tokens} tokens of {tokens.dtype.name} in {tokens.n_documents} documents"
    if told != found or len(documents) != tokens.n_documents:
        raise DataError(
            f"the files {prefix}.* are not of one corpus: .json tells of {told}, .bin and .idx hold {found}, "
            f".docs.npy {len(documents)} documents; prepare it again"
        )
    return Corpus(tokens, sidecar, documents)


def _require_totals(prefix: Path, sidecar: Sidecar, documents: npt.NDArray[np.void]) -> None:
    """Hold the documents against the totals of their domains."""
    path, told_by = add_suffix(prefix, ".docs.npy"), add_suffix(prefix, ".json")
    has_words = "n_words" in (documents.dtype.names or ())
    columns = ["n_bytes", "n_words"] if has_words else ["n_bytes"]
    sums = np.zeros((len(sidecar.domains), 1 + len(columns)), np.int64)
    for start in range(0, len(documents), _SUMMED_DOCUMENTS):
        chunk = documents[start : start + _SUMMED_DOCUMENTS]
        numbers = chunk["domain"].astype(np.int64)
        if len(wrong := numbers[numbers >= len(sums)]):
            raise DataError(
                f"{path} has a document of domain number {wrong[0]}, but {told_by} tells of {len(sums)} domains: one "
                "of the two is damaged or of another corpus; prepare it again"
            )
        np.add.at(sums[:, 0], numbers, 1)
        for place, column in enumerate(columns, start=1):
            if chunk[column].min() < 0:
                raise DataError(
                    f"{path} has a document of {chunk[column].min()} {column[2:]}: it is damaged; prepare the corpus "
                    "again"
                )
            np.add.at(sums[:, place], numbers, chunk[column])
    for domain, found in zip(sidecar.domains, sums.tolist(), strict=True):
        told = [domain.n_documents, domain.n_bytes, domain.n_words][: len(found)]
        for what, wanted, count in zip(("documents", "bytes", "words"), told, found, strict=False):
            if wanted is not None and wanted != count:
                raise DataError(
                    f"{path} has {count} {what} of the domain '{domain.name}', but {told_by} tells of {wanted}: one "
                    "of the two is damaged or of another corpus; prepare it again"
                )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
