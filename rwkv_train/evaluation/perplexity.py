"""Perplexity of documents: every token of each document is scored once, in the context of all before it.

A document starts from a state of zero. The model reads an end-of-document token and then the document, and
is scored on the document: the inputs are ``[end_of_document] + tokens[:-1]``, the targets ``tokens``. The
state is carried through the whole document, however long, so the result does not depend on the length of the
chunks in which it is read: it is that of one infinite window. The end-of-document token is not scored,
because it stands for no bytes of text.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from rwkv_train.data.corpus import Document
from rwkv_train.data.stored import TokenDocument
from rwkv_train.errors import DataError
from rwkv_train.evaluation.scoring import BATCH_SIZE, CHUNK_LEN, Sequence, score_sequences
from rwkv_train.evaluation.totals import Report, Totals
from rwkv_train.models.lm import LanguageModel
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.tokenizers.base import TokenArray


def evaluate_documents(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    batch_size: int = BATCH_SIZE,
    chunk_len: int = CHUNK_LEN,
    on_document: Callable[[Totals], None] | None = None,
) -> Report:
    """Score text; see :func:`evaluate_tokens` for the arguments.

    Raises:
        DataError: there is no text, or the tokenizer has tokens beyond the model's vocabulary.
    """
    tokenized = (
        TokenDocument(tokenizer.encode_arrays([text])[0], domain, len(text.encode()))
        for text, domain in documents
    )
    report = evaluate_tokens(
        model,
        tokenized,
        end_of_document=tokenizer.end_of_document,
        batch_size=batch_size,
        chunk_len=chunk_len,
        on_document=on_document,
    )
    if not report.total.tokens:
        raise DataError("there is nothing to score: the data holds no document with text")
    return report


def evaluate_tokens(
    model: LanguageModel,
    documents: Iterable[TokenDocument],
    *,
    end_of_document: int = 0,
    batch_size: int = BATCH_SIZE,
    chunk_len: int = CHUNK_LEN,
    on_document: Callable[[Totals], None] | None = None,
) -> Report:
    """Score tokenized documents, several side by side; neither size changes the result beyond rounding.

    Memory does not grow with the number of documents, nor with the length of one beyond its tokens and losses.
    Documents without tokens are passed over.

    Args:
        model: the model, on any device.
        documents: read once, in order.
        end_of_document: the token that stands before each document.
        batch_size: documents that are read side by side.
        chunk_len: tokens of each that are read at once; more is faster and takes more memory.
        on_document: called with the totals of each document when it is done.

    Returns:
        Sums of nats, tokens and bytes by domain, added up in float64.

    Raises:
        ConfigError: ``batch_size`` or ``chunk_len`` is below 1.
        DataError: a token is beyond the model's vocabulary.
        CheckpointError: the model's loss is not finite.
    """
    domains: dict[str, Totals] = {}
    pending: dict[int, TokenDocument] = {}  # those that the scoring has taken and not yet given back

    def sequences() -> Iterator[Sequence]:
        index = 0
        for document in documents:
            if len(document.tokens):
                pending[index] = document
                yield _sequence(document.tokens, end_of_document)
                index += 1

    for score in score_sequences(model, sequences(), batch_size=batch_size, chunk_len=chunk_len):
        document = pending.pop(score.index)
        nats = float(score.losses.sum(dtype=np.float64))
        totals = Totals(1, len(document.tokens), document.n_bytes, nats)
        domains[document.domain] = domains.get(document.domain, Totals()) + totals
        if on_document is not None:
            on_document(totals)
    return Report(dict(sorted(domains.items())))


def _sequence(tokens: TokenArray, prefix_token: int) -> Sequence:
    text = np.concatenate([np.array([prefix_token], np.int32), tokens.astype(np.int32)])
    return Sequence(inputs=text[:-1], targets=text[1:])
