"""Datasets of conversations, read and tokenized; what cannot be used is refused, or left out and counted."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from rwkv_train.config.instruct import BUILTIN, InstructDataConfig, InstructDataset
from rwkv_train.data.instruct.builtin import builtin_records
from rwkv_train.data.instruct.records import to_conversation
from rwkv_train.data.instruct.templates import ChatTemplate
from rwkv_train.data.instruct.tokens import TokenizedConversation, is_cut_as_whole, runs_of, tokenize
from rwkv_train.data.sources.base import BadRecord, Record, SourceOptions
from rwkv_train.data.sources.opening import open_source
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import Tokenizer

UNUSABLE, TOO_LONG = "cannot be used", "longer than max_tokens"
"""Why records are left out."""

_N_EXAMPLES = 3  # that are kept of each reason


class ReadDataset(NamedTuple):
    """What one dataset came to."""

    dataset: InstructDataset
    conversations: list[TokenizedConversation]
    """At least one."""
    n_records: int
    left_out: Counter[str]
    """Records by reason."""
    examples: dict[str, list[str]]
    """The first ones of each reason: place and what is wrong."""
    n_cut_otherwise: int | None
    """Conversations whose tokens are not those of their whole text; ``None``: not looked at."""


def read_conversations(
    config: InstructDataConfig,
    tokenizer: Tokenizer,
    *,
    max_records: int | None = None,
    compare_whole: bool = False,
) -> list[ReadDataset]:
    """Read all datasets.

    Args:
        config: which, and how.
        tokenizer: the model's.
        max_records: take only so many of each dataset.
        compare_whole: count the conversations that would be cut otherwise as one text, which doubles the time.

    Raises:
        DataError: a dataset cannot be read; a record cannot be used, unless ``bad_records`` says to drop it; or nothing
            is left of a dataset.
    """
    template = ChatTemplate(config.template)
    sources = [_open(dataset) for dataset in config.datasets]  # all, before the first one is read
    return [
        _read(config, dataset, islice(source, max_records), template, tokenizer, compare_whole=compare_whole)
        for dataset, source in zip(config.datasets, sources, strict=True)
    ]


def _open(dataset: InstructDataset) -> Iterator[Record | BadRecord]:
    if dataset.path == BUILTIN:
        return builtin_records(dataset.split)
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
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    compare_whole: bool,
) -> ReadDataset:
    read = ReadDataset(dataset, [], 0, Counter(), {}, None)
    n_records, n_cut_otherwise = 0, 0
    for n_records, record in enumerate(records, start=1):  # noqa: B007 - it is used after the loop
        if isinstance(record, BadRecord):
            where, why = record
        else:
            where = record.where
            try:
                runs = runs_of(to_conversation(record, dataset), template, config.learn)
                conversation = tokenize(where, runs, tokenizer)
            except DataError as error:
                why = str(error)
            else:
                if config.max_tokens is not None and conversation.n_inputs > config.max_tokens:
                    _leave_out(read, TOO_LONG, f"{where}: {conversation.n_inputs} tokens")
                    continue
                read.conversations.append(conversation)
                if compare_whole:
                    n_cut_otherwise += not is_cut_as_whole(conversation, runs, tokenizer)
                continue
        if config.bad_records == "refuse":
            raise DataError(f"{where}: {why}")
        _leave_out(read, UNUSABLE, f"{where}: {why}")
    if not read.conversations:
        examples = "; ".join(texts[0] for texts in read.examples.values()) or "it holds no records"
        raise DataError(f"data.datasets: nothing is left of {dataset.path} to learn from: {examples}")
    return read._replace(n_records=n_records, n_cut_otherwise=n_cut_otherwise if compare_whole else None)


def _leave_out(read: ReadDataset, reason: str, text: str) -> None:
    read.left_out[reason] += 1
    examples = read.examples.setdefault(reason, [])
    if len(examples) < _N_EXAMPLES:
        examples.append(text)
