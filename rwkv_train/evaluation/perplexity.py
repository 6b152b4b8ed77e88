"""Perplexity of documents: every token of each document is scored once, in the context that the mode gives it.

The model reads a prefix, as a rule the end-of-document token, and then the document, and is scored on the document:
the inputs are ``[prefix] + tokens[:-1]``, the targets ``tokens``. The prefix is not scored, because it stands for no
bytes of text. What else is known when a token is predicted, the mode says:

- ``stateful``: all of the document before it. The state is carried from the first token to the last, so the result is
  that of one infinite window.
- ``windowed``: what stands before it in its window, as in lm-evaluation-harness.
- ``stream``: all of the data before it. Documents are read in the order given, with the prefix between them.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.data.sources.base import Document
from rwkv_train.data.stored import TokenDocument
from rwkv_train.errors import DataError
from rwkv_train.evaluation.modes import Mode, require_mode
from rwkv_train.evaluation.report import Report
from rwkv_train.evaluation.scoring import BATCH_SIZE, CHUNK_LEN, Score, Sequence, score_sequences
from rwkv_train.evaluation.stream import score_stream
from rwkv_train.evaluation.totals import Totals, count_words
from rwkv_train.evaluation.windows import Piece, rolling_windows, streamed, whole
from rwkv_train.models.lm import NO_TARGET, LanguageModel
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.tokenizers.base import TokenArray


class Reading(NamedTuple):
    """How documents are read."""

    mode: Mode = Mode.STATEFUL
    window: int | None = None
    """Tokens of a window, for ``windowed``."""
    prefix_token: int | None = 0
    """Read before a document, or between documents of a stream; ``None``: the first token is not scored."""
    batch_size: int = BATCH_SIZE
    """Sequences that are read side by side; a stream is read in chunks as large as the whole batch."""
    chunk_len: int = CHUNK_LEN
    """Tokens of each that are read at once; neither size changes the result beyond rounding."""


class TokenizedText(NamedTuple):
    """A document to be scored."""

    number: int
    """Its position in the data, from 0."""
    tokens: TokenArray
    domain: str
    n_bytes: int
    n_words: int


def tokenize(tokenizer: Tokenizer, documents: Iterable[tuple[int, Document]]) -> Iterator[TokenizedText]:
    """Yield the tokens of numbered documents, with the bytes and words of their text."""
    for number, (text, domain) in documents:
        tokens = tokenizer.encode_arrays([text])[0]
        yield TokenizedText(number, tokens, domain, len(text.encode()), count_words(text))


def evaluate_documents(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    reading: Reading | None = None,
    *,
    on_document: Callable[[Totals], None] | None = None,
) -> Report:
    """Score text; see :func:`evaluate` for the arguments.

    Args:
        model: the model, on any device.
        tokenizer: its tokenizer.
        documents: read once, in order.
        reading: as a rule each document whole, after the tokenizer's end-of-document token.
        on_document: called with the totals of each document when it is done.

    Raises:
        DataError: there is no text, or the tokenizer has tokens beyond the model's vocabulary.
    """
    reading = reading or Reading(prefix_token=tokenizer.end_of_document)
    report = evaluate(model, tokenize(tokenizer, enumerate(documents)), reading, on_document=on_document)
    require_scored(report)
    return report


def evaluate_tokens(
    model: LanguageModel,
    documents: Iterable[TokenDocument],
    reading: Reading | None = None,
    *,
    on_document: Callable[[Totals], None] | None = None,
) -> Report:
    """Score documents that are tokenized already; see :func:`evaluate`. Their words are not known."""
    texts = (
        TokenizedText(number, tokens, domain, n_bytes, n_words=0)
        for number, (tokens, domain, n_bytes) in enumerate(documents)
    )
    return evaluate(model, texts, reading or Reading(), on_document=on_document)


def evaluate(
    model: LanguageModel,
    texts: Iterable[TokenizedText],
    reading: Reading,
    *,
    on_document: Callable[[Totals], None] | None = None,
) -> Report:
    """Score tokenized documents, several side by side.

    Memory does not grow with the number of documents, nor with the length of one beyond its tokens and losses.
    Documents without text are passed over. A text of which the tokenizer makes no token costs no nats, but its bytes
    and words count: models with other tokenizers are scored on the same documents.

    Args:
        model: the model, on any device.
        texts: read once, in order.
        reading: how they are read.
        on_document: called with the totals of each document when it is done.

    Returns:
        Sums by domain, added up in float64.

    Raises:
        ConfigError: a size is below 1, or settings do not go together.
        DataError: a token is outside the model's vocabulary.
        CheckpointError: a loss is not finite.
    """
    require_mode(reading.mode, reading.window, has_prefix=reading.prefix_token is not None)
    report = Report()

    def add(text: TokenizedText, losses: npt.NDArray[np.floating]) -> None:
        n_unscored = 1 if reading.prefix_token is None and len(text.tokens) else 0
        totals = Totals(
            documents=1,
            tokens=len(text.tokens) - n_unscored,
            bytes=text.n_bytes,
            words=text.n_words,
            nats=float(losses.sum(dtype=np.float64)),
        )
        report.add(text.domain, totals, losses, number=text.number, n_unscored=n_unscored)
        if on_document is not None:
            on_document(totals)

    def with_tokens() -> Iterator[TokenizedText]:
        for text in texts:
            if len(text.tokens):
                yield text
            elif text.n_bytes:
                add(text, np.zeros(0, np.float32))

    for scored in _score(model, with_tokens(), reading):
        assert scored.losses is not None
        add(scored.text, scored.losses)
    return report


def require_scored(report: Report) -> None:
    """Refuse a report of nothing.

    Raises:
        DataError: no token was scored.
    """
    total = report.total
    if total.tokens:
        return
    if not total.documents:
        raise DataError("there is nothing to score: the data holds no document with text")
    if not report.positions.documents.any():
        raise DataError(
            f"there is nothing to score: of all {total.bytes} bytes of text the tokenizer makes no token; is it the "
            "right one?"
        )
    raise DataError(
        "there is nothing to score: no document has more than one token, and with --prefix-token none the first is "
        "only read; leave that option out"
    )


class _Unfinished:
    """A document of which some pieces are not scored yet."""

    def __init__(self, text: TokenizedText) -> None:
        self.text = text
        self.losses: npt.NDArray[np.floating] | None = None
        self.n_missing = 0

    def add(self, score: Score, piece: Piece) -> None:
        if self.losses is None:
            self.losses = np.zeros(len(self.text.tokens), score.losses.dtype)
        losses = score.losses[piece.sequence.targets != NO_TARGET]
        self.losses[piece.start : piece.start + len(losses)] = losses
        self.n_missing -= 1


def _score(model: LanguageModel, texts: Iterable[TokenizedText], reading: Reading) -> Iterator[_Unfinished]:
    """Yield documents with all their losses, as they are done."""
    taken: dict[int, tuple[_Unfinished, Piece]] = {}  # by the number of the sequence, until it is scored

    def sequences() -> Iterator[Sequence]:
        n_sequences = 0
        for text in texts:
            unfinished = _Unfinished(text)
            pieces = list(_cut(text.tokens, reading))
            unfinished.n_missing = len(pieces)
            for piece in pieces:
                taken[n_sequences] = (unfinished, piece)
                n_sequences += 1
                yield piece.sequence

    if reading.mode is Mode.STREAM:
        scores = score_stream(model, sequences(), chunk_len=reading.batch_size * reading.chunk_len)
    else:
        scores = score_sequences(
            model, sequences(), batch_size=reading.batch_size, chunk_len=reading.chunk_len
        )
    for score in scores:
        unfinished, piece = taken.pop(score.index)
        unfinished.add(score, piece)
        if not unfinished.n_missing:
            yield unfinished


def _cut(tokens: TokenArray, reading: Reading) -> Iterator[Piece]:
    """Yield the sequences that score a document, at least one."""
    if reading.mode is Mode.WINDOWED:
        assert reading.window is not None
        yield from rolling_windows(tokens, reading.prefix_token, reading.window)
    elif reading.mode is Mode.STREAM:
        assert reading.prefix_token is not None
        yield from streamed(tokens, reading.prefix_token)
    else:
        yield from whole(tokens, reading.prefix_token)
