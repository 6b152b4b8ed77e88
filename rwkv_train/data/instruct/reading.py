"""Datasets of conversations or pairs, read and tokenized; what cannot be used is refused, or left out and counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from rwkv_train.config.instruct import BUILTIN, InstructDataConfig, InstructDataset
from rwkv_train.data.instruct.builtin import builtin_pairs, builtin_records
from rwkv_train.data.instruct.pairs import PreferencePair, check_pair, to_two_conversations
from rwkv_train.data.instruct.records import named_parts, parts_in, to_conversation
from rwkv_train.data.instruct.templates import ChatTemplate
from rwkv_train.data.instruct.tokens import Run, TokenizedConversation, is_cut_as_whole, runs_of, tokenize
from rwkv_train.data.sources.base import BadRecord, Record, SourceOptions
from rwkv_train.data.sources.opening import open_source
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import Tokenizer

UNUSABLE, TOO_LONG, TOO_LONG_FOR_A_ROW = "cannot be used", "longer than max_tokens", "longer than a row"
"""Why records are left out."""

_N_EXAMPLES = 3  # that are kept of each reason

Sample = TypeVar("Sample", TokenizedConversation, PreferencePair)


class ReadDataset(NamedTuple, Generic[Sample]):
    """What one dataset came to."""

    dataset: InstructDataset
    samples: list[Sample]
    """Its conversations, or its pairs; at least one."""
    n_records: int
    left_out: Counter[str]
    """Records by reason."""
    examples: dict[str, list[str]]
    """The first ones of each reason: place and what is wrong."""
    n_cut_otherwise: int | None
    """Samples whose tokens are not those of their whole text; ``None``: not looked at."""


def read_conversations(
    config: InstructDataConfig,
    tokenizer: Tokenizer,
    *,
    max_records: int | None = None,
    compare_whole: bool = False,
) -> list[ReadDataset[TokenizedConversation]]:
    """Read all datasets.

    Args:
        config: which, and how; none of the format "preference".
        tokenizer: the model's.
        max_records: take only so many of each dataset.
        compare_whole: count the conversations that would be cut otherwise as one text, which doubles the time.

    Raises:
        DataError: a dataset cannot be read; a record cannot be used, unless ``bad_records`` says to drop it; nothing is
            left of a dataset; or no record has a field that ``fields`` names.
        ValueError: these are pairs.
    """
    if config.has_pairs:
        raise ValueError("the datasets have the format 'preference'; read_pairs reads them")
    template = ChatTemplate(config.template)

    def make(record: Record, dataset: InstructDataset) -> _Made[TokenizedConversation]:
        runs = runs_of(to_conversation(record, dataset), template, config.learn)
        conversation = tokenize(record.where, runs, tokenizer)
        return _Made(conversation, (_Side(conversation, runs),))

    return _read_all(config, tokenizer, make, max_records, compare_whole=compare_whole, ctx_len=None)


def read_pairs(
    config: InstructDataConfig,
    tokenizer: Tokenizer,
    ctx_len: int,
    *,
    max_records: int | None = None,
    compare_whole: bool = False,
) -> list[ReadDataset[PreferencePair]]:
    """Read all datasets of pairs; ``max_tokens`` holds for each of the two conversations.

    Args:
        config: which, and how; all of the format "preference".
        tokenizer: the model's.
        ctx_len: tokens of a row. Both conversations of a pair stand in one.
        max_records: take only so many of each dataset.
        compare_whole: count the pairs that would be cut otherwise as two texts, which doubles the time.

    Raises:
        DataError: a dataset cannot be read; a record cannot be used or a pair is longer than a row, unless
            ``bad_records`` says to drop it; or nothing is left of a dataset.
        ValueError: these are no pairs.
    """
    if not config.has_pairs:
        raise ValueError("the datasets do not have the format 'preference'; read_conversations reads them")
    template = ChatTemplate(config.template)

    def make(record: Record, dataset: InstructDataset) -> _Made[PreferencePair]:
        sides = []
        for conversation in to_two_conversations(record, dataset):
            runs = runs_of(conversation, template, config.learn)
            sides.append(_Side(tokenize(record.where, runs, tokenizer), runs))
        pair = PreferencePair(record.where, *(side.conversation for side in sides))
        check_pair(pair)
        return _Made(pair, tuple(sides))

    return _read_all(config, tokenizer, make, max_records, compare_whole=compare_whole, ctx_len=ctx_len)


class _Side(NamedTuple):
    conversation: TokenizedConversation
    runs: list[Run]


class _Made(NamedTuple, Generic[Sample]):
    sample: Sample
    sides: tuple[_Side, ...]
    """The one conversation, or the two of a pair."""


def _read_all(
    config: InstructDataConfig,
    tokenizer: Tokenizer,
    make: Callable[[Record, InstructDataset], _Made[Sample]],
    max_records: int | None,
    *,
    compare_whole: bool,
    ctx_len: int | None,
) -> list[ReadDataset[Sample]]:
    sources = [open_records(dataset) for dataset in config.datasets]  # all, before the first one is read
    return [
        _read(
            config,
            dataset,
            islice(source, max_records),
            tokenizer,
            make,
            compare_whole=compare_whole,
            ctx_len=ctx_len,
            is_whole=max_records is None,
        )
        for dataset, source in zip(config.datasets, sources, strict=True)
    ]


def open_records(dataset: InstructDataset) -> Iterator[Record | BadRecord]:
    """Open a dataset, of which nothing is read yet.

    Raises:
        DataError: it is missing, or of an unknown kind.
    """
    if dataset.path == BUILTIN:
        return (builtin_pairs if dataset.format == "preference" else builtin_records)(dataset.split)
    options = SourceOptions(
        format=dataset.file_format or ("json" if dataset.path.lower().endswith(".json") else None),
        dataset_config=dataset.config,
        dataset_split=dataset.split,
        dataset_streaming=dataset.streaming,
        whole_records=True,
    )
    source = open_source(dataset.path, options)
    return (record for block in source.blocks() for record in block.whole_records())


def _read(
    config: InstructDataConfig,
    dataset: InstructDataset,
    records: Iterator[Record | BadRecord],
    tokenizer: Tokenizer,
    make: Callable[[Record, InstructDataset], _Made[Sample]],
    *,
    compare_whole: bool,
    ctx_len: int | None,
    is_whole: bool,
) -> ReadDataset[Sample]:
    samples: list[Sample] = []
    read = ReadDataset(dataset, samples, 0, Counter(), {}, None)
    n_records, n_cut_otherwise = 0, 0
    unseen = named_parts(dataset)
    for n_records, record in enumerate(records, start=1):  # noqa: B007 - it is used after the loop
        reason = UNUSABLE
        if isinstance(record, BadRecord):
            where, why = record
        else:
            where = record.where
            if unseen:
                unseen -= parts_in(record, dataset, unseen)
            try:
                sample, sides = make(record, dataset)
            except DataError as error:
                why = str(error)
            else:
                longest = max(side.conversation.n_inputs for side in sides)
                if config.max_tokens is not None and longest > config.max_tokens:
                    _leave_out(read, TOO_LONG, f"{where}: {longest} tokens")
                    continue
                if ctx_len is None or sample.n_inputs <= ctx_len:
                    samples.append(sample)
                    if compare_whole:
                        n_cut_otherwise += not all(is_cut_as_whole(*side, tokenizer) for side in sides)
                    continue
                reason = TOO_LONG_FOR_A_ROW
                why = (
                    f"its two conversations have {sample.n_inputs} tokens, and both must stand in one row of {ctx_len};"
                    " set model.ctx_len higher, or leave the pair out with data.bad_records: drop"
                )
        if config.bad_records == "refuse":
            raise DataError(f"{where}: {why}")
        _leave_out(read, reason, f"{where}: {why}")
    if not samples:
        reasons = [
            f"{read.left_out[reason]:,} {reason}, such as {texts[0]}"
            for reason, texts in read.examples.items()
        ]
        raise DataError(
            f"nothing is left of {dataset.path} to learn from: {'; '.join(reasons) or 'it holds no records'}"
        )
    if unseen and is_whole:
        part = min(unseen)
        raise DataError(
            f"no record of {dataset.path} has {dataset.fields[part]!r}, which fields names for {part!r}; correct the "
            "name, or leave it out"
        )
    return read._replace(n_records=n_records, n_cut_otherwise=n_cut_otherwise if compare_whole else None)


def _leave_out(read: ReadDataset[Sample], reason: str, text: str) -> None:
    read.left_out[reason] += 1
    examples = read.examples.setdefault(reason, [])
    if len(examples) < _N_EXAMPLES:
        examples.append(text)
