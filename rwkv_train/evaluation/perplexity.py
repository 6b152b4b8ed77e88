"""Perplexity of documents: every token of each document is scored once, in the context of all before it.

A document starts from a state of zero. The model reads an end-of-document token and then the document, and
is scored on the document: the inputs are ``[end_of_document] + tokens[:-1]``, the targets ``tokens``. The
state is carried through the whole document, however long, so the result does not depend on the length of the
chunks in which it is read: it is that of one infinite window. The end-of-document token is not scored,
because it stands for no bytes of text.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from rwkv_train.data.corpus import Document
from rwkv_train.data.stored import TokenDocument
from rwkv_train.errors import CheckpointError, ConfigError, DataError
from rwkv_train.evaluation.totals import Report, Totals
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.state import LayerState, ModelState
from rwkv_train.tokenizers import Tokenizer

BATCH_SIZE = 8
CHUNK_LEN = 256

WINDOW_TOKENS = 1 << 20
WINDOW_DOCUMENTS = 1024
"""Documents are sorted by length within windows that end at either limit, so that lanes hold similar ones."""


@dataclass
class _Lane:
    """One row of the batch: a document and how far it is scored."""

    document: TokenDocument
    position: int = 0
    nats: float = 0.0

    @property
    def remaining(self) -> int:
        return len(self.document.tokens) - self.position


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


@torch.no_grad()  # not inference_mode: FSDP keeps what it gathers here for the training that goes on
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

    Memory does not grow with the number of documents, nor with the length of one beyond its tokens.
    Documents without tokens are passed over.

    Args:
        model: the model, on any device.
        documents: read once, in order; held one window at a time.
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
    for name, size in (("batch_size", batch_size), ("chunk_len", chunk_len)):
        if size < 1:
            raise ConfigError(f"{name} is {size}; it must be at least 1")
    queue = _similar_lengths_together(_checked(documents, model.config.vocab_size))
    domains: dict[str, Totals] = {}
    lanes: list[_Lane] = []
    state = model.zero_state(0)
    while True:
        started = [_Lane(document) for document in islice(queue, batch_size - len(lanes))]
        state = _join_rows(state, model.zero_state(len(started)))
        lanes += started
        if not lanes:
            return Report(dict(sorted(domains.items())))

        state = _score_chunk(model, lanes, state, end_of_document, chunk_len)
        for lane in lanes:
            if not lane.remaining:
                totals = _totals_of(lane)
                domain = lane.document.domain
                domains[domain] = domains.get(domain, Totals()) + totals
                if on_document is not None:
                    on_document(totals)
        going_on = [row for row, lane in enumerate(lanes) if lane.remaining]
        state = _take_rows(state, going_on)
        lanes = [lanes[row] for row in going_on]


def _score_chunk(
    model: LanguageModel, lanes: list[_Lane], state: ModelState, end_of_document: int, chunk_len: int
) -> ModelState:
    """Let each lane read its next tokens, at most ``chunk_len``, and add their nats to it."""
    n_tokens = min(chunk_len, max(lane.remaining for lane in lanes))
    inputs = np.zeros((len(lanes), n_tokens), dtype=np.int64)
    targets = np.zeros_like(inputs)
    for row, lane in enumerate(lanes):
        # What follows a shorter document is padding: read after all its tokens, never scored.
        scored = lane.document.tokens[lane.position : lane.position + n_tokens]
        before = lane.document.tokens[lane.position - 1] if lane.position else end_of_document
        inputs[row, 0] = before
        inputs[row, 1 : len(scored)] = scored[:-1]
        targets[row, : len(scored)] = scored

    device = next(model.parameters()).device
    output = model(torch.from_numpy(inputs).to(device), state, torch.from_numpy(targets).to(device))
    losses = output.losses.to("cpu", torch.float64)  # [B, T]
    for row, lane in enumerate(lanes):
        n_scored = min(n_tokens, lane.remaining)
        lane.nats += float(losses[row, :n_scored].sum())
        lane.position += n_scored
    new_state: ModelState = output.state
    return new_state


def _checked(documents: Iterable[TokenDocument], vocab_size: int) -> Iterator[TokenDocument]:
    for document in documents:
        if not len(document.tokens):
            continue
        highest = int(document.tokens.max())
        if highest >= vocab_size:
            raise DataError(
                f"token {highest} of a document is beyond the model's vocabulary of {vocab_size}: "
                "the tokenizer is not the model's"
            )
        yield document


def _similar_lengths_together(documents: Iterable[TokenDocument]) -> Iterator[TokenDocument]:
    """Sort by length, longest first, within windows of bounded size."""
    window: list[TokenDocument] = []
    n_tokens = 0
    for document in documents:
        window.append(document)
        n_tokens += len(document.tokens)
        if n_tokens >= WINDOW_TOKENS or len(window) >= WINDOW_DOCUMENTS:
            yield from sorted(window, key=_length, reverse=True)
            window, n_tokens = [], 0
    yield from sorted(window, key=_length, reverse=True)


def _length(document: TokenDocument) -> int:
    return len(document.tokens)


def _totals_of(lane: _Lane) -> Totals:
    if not isfinite(lane.nats):
        raise CheckpointError(
            f"the loss of a document of '{lane.document.domain}' is {lane.nats}, not finite: the model's "
            "weights are damaged, or its numbers are too large for the dtype (try float32)"
        )
    return Totals(1, len(lane.document.tokens), lane.document.n_bytes, lane.nats)


def _join_rows(state: ModelState, below: ModelState) -> ModelState:
    # The dtype of a carried state is the activations', under autocast perhaps not the weights'.
    return tuple(
        LayerState(*(torch.cat([x, y.to(x.dtype)]) for x, y in zip(layer, new, strict=True)))
        for layer, new in zip(state, below, strict=True)
    )


def _take_rows(state: ModelState, rows: list[int]) -> ModelState:
    def take(x: Tensor) -> Tensor:
        return x[torch.tensor(rows, dtype=torch.int64, device=x.device)]

    return tuple(LayerState(*map(take, layer)) for layer in state)
