"""Turn text files into a tokenized corpus on disk."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.data.corpus import Document, read_documents
from rwkv_train.data.sidecar import DocumentTableWriter, DomainCounter, Sidecar, Source
from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import Tokenizer, token_dtype

_BATCH_CHARACTERS = 1 << 20  # tokenized at once

Progress = Callable[[int], None]
"""Called with the number of bytes of the sources read since the last call."""


class PreparedSummary(NamedTuple):
    """What :func:`prepare_data` made."""

    prefix: Path
    """Of the .bin, .idx, .docs.npy and .json files."""
    sidecar: Sidecar
    """Totals, domains, sources."""


def prepare_data(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    output_prefix: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedSummary:
    """Tokenize documents into ``.bin/.idx`` and a sidecar, in constant memory.

    Each document is its tokens and one end-of-document token. Documents without text are skipped and
    counted. All four files appear together when they are complete, or not at all.

    Args:
        inputs: files that :func:`~rwkv_train.data.corpus.read_documents` can read, in order.
        tokenizer: what cuts the texts.
        output_prefix: path of the files without their endings.
        overwrite: replace files that exist, instead of refusing.
        progress: told of the bytes of the inputs that are done.

    Raises:
        DataError: an input cannot be used, the output exists, or it cannot be written.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_document], dtype=dtype)
    counter = DomainCounter()
    n_skipped_empty = 0
    max_token = tokenizer.end_of_document
    sources: list[Source] = []
    with TokenFileWriter(output_prefix, dtype, overwrite=overwrite, beside=(".docs.npy", ".json")) as writer:
        table = DocumentTableWriter(writer.file(".docs.npy"))
        for path in inputs:
            for batch in _batches(read_documents([path], keep_empty=True, on_bytes=progress)):
                documents = [document for document in batch if document.text]
                n_skipped_empty += len(batch) - len(documents)
                ids = tokenizer.encode_arrays([document.text for document in documents])
                for document, tokens in zip(documents, ids, strict=True):
                    n_bytes = len(document.text.encode())
                    n_words = len(re.split(r"\s+", document.text))
                    table.add(
                        counter.add(document.domain, len(tokens) + 1, n_bytes, n_words), n_bytes, n_words
                    )
                    writer.add_document(np.concatenate([tokens, end]))
                    max_token = max(max_token, int(tokens.max(initial=0)))
            sources.append(_describe(path))
        if writer.n_documents == 0:
            raise DataError(f"none of the documents in {', '.join(map(str, inputs))} has any text")
        table.finish()
        domains = counter.totals()
        sidecar = Sidecar(
            tokenizer=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            dtype=np.dtype(dtype).name,
            n_documents=writer.n_documents,
            n_skipped_empty=n_skipped_empty,
            n_tokens=writer.n_tokens,
            n_bytes=sum(domain.n_bytes for domain in domains),
            max_token=max_token,
            sha256=writer.sha256,
            domains=domains,
            sources=tuple(sources),
            n_words=sum(domain.n_words or 0 for domain in domains),
        )
        writer.file(".json").write(sidecar.to_json().encode())
    return PreparedSummary(output_prefix, sidecar)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Group documents to about ``_BATCH_CHARACTERS``, for the tokenizers' batch encoding."""
    batch: list[Document] = []
    n_characters = 0
    for document in documents:
        batch.append(document)
        n_characters += len(document.text)
        if n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _describe(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return Source(str(path), file.tell(), sha256)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
