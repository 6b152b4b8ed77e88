"""What a run on chat data would see: samples with what is learned, lengths, and what was left out."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from rwkv_train.config.instruct import InstructDataConfig, InstructDataset
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.reading import ReadDataset, read_conversations, read_pairs
from rwkv_train.data.instruct.rows import pack, pack_pairs
from rwkv_train.data.instruct.samples import ConversationOrder
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.tokenizers import Tokenizer, load_tokenizer

Side = Literal["chosen", "rejected"]
"""Which answer of a pair."""


class Span(NamedTuple):
    """A part of a sample, decoded from its tokens."""

    text: str
    is_learned: bool
    is_end: bool = False
    """It is an end-of-document token, which has no text."""


class PreviewSample(NamedTuple):
    """One conversation as the model gets it."""

    where: str
    n_tokens: int
    """Positions that the model reads."""
    n_learned: int
    spans: tuple[Span, ...]
    side: Side | None = None
    """Which answer of a pair it has; ``None``: it is of no pair."""


class DatasetSummary(NamedTuple):
    """What one dataset came to."""

    path: str
    weight: float
    n_records: int
    n_kept: int
    """Conversations, or pairs of two of them."""
    n_tokens: int
    n_learned: int
    longest: int
    """Tokens of its longest conversation."""
    n_segmented: int
    """Conversations longer than ctx_len, which are read in segments."""
    n_cut_otherwise: int | None
    """Conversations (or pairs) whose tokens are not those of their whole text: inference that tokenizes the prompt sees
    ours. ``None``: not looked at."""
    left_out: dict[str, int]
    """Records by reason."""
    examples: dict[str, list[str]]
    """The first ones of each reason."""


class Preview(NamedTuple):
    """What data came to, and what ``rwkv-train preview-data`` shows of them."""

    datasets: tuple[DatasetSummary, ...]
    histogram: tuple[tuple[int, int], ...]
    """``(limit, count)``: conversations of at most ``limit`` tokens and more than the limit before; powers of two."""
    ctx_len: int
    n_rows: int
    """Rows of ctx_len positions that one epoch of all datasets takes."""
    n_tokens: int
    """Positions of all conversations, which stand in those rows."""
    samples: tuple[PreviewSample, ...]
    """The chosen and the rejected side of a pair come one after the other."""
    held_out: tuple[DatasetSummary, ...] = ()
    """What ``data.valid`` names; its weights mean nothing."""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "datasets": [dataset._asdict() for dataset in self.datasets],
            "held_out": [dataset._asdict() for dataset in self.held_out],
            "histogram": [
                {"at_most_tokens": limit, "conversations": count} for limit, count in self.histogram
            ],
            "ctx_len": self.ctx_len,
            "n_rows": self.n_rows,
            "n_tokens": self.n_tokens,
            "samples": [
                {**sample._asdict(), "spans": [span._asdict() for span in sample.spans]}
                for sample in self.samples
            ],
        }


def make_preview(
    config: InstructDataConfig,
    ctx_len: int,
    *,
    n_samples: int = 3,
    max_records: int | None = None,
    seed: int = 0,
) -> Preview:
    """Read the datasets and show the first samples of a run with this seed, before ``valid_fraction`` holds any out.

    Args:
        config: the data.
        ctx_len: tokens of a row.
        n_samples: samples to show; no more than there are.
        max_records: take only so many of each dataset.
        seed: of the order.

    Raises:
        DataError: as :func:`~rwkv_train.data.instruct.reading.read_conversations`.
    """
    tokenizer = load_tokenizer(config.tokenizer)

    def read(datasets: list[InstructDataset]) -> Sequence[ReadDataset[Any]]:
        these = config.model_copy(update={"datasets": datasets})
        if config.has_pairs:
            return read_pairs(these, tokenizer, ctx_len, max_records=max_records, compare_whole=True)
        return read_conversations(these, tokenizer, max_records=max_records, compare_whole=True)

    learned = read(config.datasets)
    held_out = read(config.valid) if config.valid is not None else []
    sizes = [len(one.samples) for one in learned]
    order = ConversationOrder(sizes, [one.dataset.weight for one in learned], seed)
    places = [order.locate(sample) for sample in range(min(n_samples, sum(sizes)))]
    shown = [
        _show(conversation, side, tokenizer)
        for dataset, number in places
        for side, conversation in _sides(learned[dataset].samples[number])
    ]
    return summarize(learned, ctx_len)._replace(
        samples=tuple(shown), held_out=tuple(_summarize(one, ctx_len) for one in held_out)
    )


def summarize(read: Sequence[ReadDataset[Any]], ctx_len: int) -> Preview:
    """Count what datasets came to, without showing samples.

    Args:
        read: the datasets, all of conversations or all of pairs.
        ctx_len: tokens of a row.
    """
    samples = [sample for one in read for sample in one.samples]
    lengths = [sample.n_inputs for sample in samples]
    has_pairs = isinstance(samples[0], PreferencePair)
    return Preview(
        tuple(_summarize(one, ctx_len) for one in read),
        _histogram([length for one in read for length in _lengths(one)]),
        ctx_len,
        len(pack_pairs(lengths, ctx_len)) if has_pairs else sum(map(len, pack(lengths, ctx_len))),
        sum(lengths),
        samples=(),
    )


def _sides(
    sample: TokenizedConversation | PreferencePair,
) -> list[tuple[Side | None, TokenizedConversation]]:
    if isinstance(sample, PreferencePair):
        return [("chosen", sample.chosen), ("rejected", sample.rejected)]
    return [(None, sample)]


def _lengths(read: ReadDataset[Any]) -> list[int]:
    return [conversation.n_inputs for sample in read.samples for _, conversation in _sides(sample)]


def _summarize(read: ReadDataset[Any], ctx_len: int) -> DatasetSummary:
    lengths = _lengths(read)
    return DatasetSummary(
        path=read.dataset.path,
        weight=read.dataset.weight,
        n_records=read.n_records,
        n_kept=len(read.samples),
        n_tokens=sum(lengths),
        n_learned=sum(sample.n_learned for sample in read.samples),
        longest=max(lengths),
        n_segmented=sum(length > ctx_len for length in lengths),
        n_cut_otherwise=read.n_cut_otherwise,
        left_out=dict(read.left_out),
        examples=read.examples,
    )


def _histogram(lengths: list[int]) -> tuple[tuple[int, int], ...]:
    exponents = [(length - 1).bit_length() for length in lengths]
    return tuple((1 << e, exponents.count(e)) for e in range(min(exponents), max(exponents) + 1))


def _show(conversation: TokenizedConversation, side: Side | None, tokenizer: Tokenizer) -> PreviewSample:
    end = tokenizer.end_of_document
    tokens = zip(conversation.tokens.tolist(), conversation.is_learned.tolist(), strict=True)
    spans = []
    for (is_learned, is_end), group in groupby(tokens, key=lambda pair: (pair[1], pair[0] == end)):
        text = tokenizer.decode_bytes([token for token, _ in group]).decode(errors="replace")
        spans.append(Span(text, is_learned, is_end))
    return PreviewSample(
        conversation.where, conversation.n_inputs, conversation.n_learned, tuple(spans), side
    )
