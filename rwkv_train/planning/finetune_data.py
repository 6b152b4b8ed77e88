"""What the data of a finetuning run come to: all datasets are read, whatever is wrong with one of them."""

from typing import Any

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.config.instruct import InstructDataset
from rwkv_train.data.instruct.reading import (
    TOO_LONG_FOR_A_ROW,
    UNUSABLE,
    ReadDataset,
    open_records,
    read_conversations,
    read_pairs,
)
from rwkv_train.data.instruct.split import Split, read_split
from rwkv_train.data.instruct.templates import ChatTemplate
from rwkv_train.errors import DataError
from rwkv_train.planning.problems import Problems
from rwkv_train.tokenizers import Tokenizer


def read_data(config: FinetuneConfig, tokenizer: Tokenizer | None, problems: Problems) -> Split[Any] | None:
    """Read what a run learns from and what is held out, as the run does.

    Args:
        config: the settings of the run.
        tokenizer: the model's; ``None``: it cannot be read, and the datasets are only opened.
        problems: where it is noted what is wrong: of each dataset one problem.

    Returns:
        ``None`` where a dataset to learn from cannot be used; where a held-out one cannot, nothing is held out.
    """
    data = config.data
    valid = data.valid or []
    has_template = problems.passes(ChatTemplate, data.template)
    if tokenizer is None or not has_template:
        for dataset in (*data.datasets, *valid):
            problems.of(open_records, dataset)
        return None
    train = [problems.of(_read, "datasets", dataset, config, tokenizer) for dataset in data.datasets]
    held_out = [problems.of(_read, "valid", dataset, config, tokenizer) for dataset in valid]
    parts = [None if one is None else problems.of(_divide, one, config) for one in train]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    return Split(
        [one for part in whole for one in part.train],
        {name: samples for part in whole for name, samples in part.valid.items()}
        | {one.dataset.name: one.samples for one in held_out if one is not None},
    )


def _read(
    setting: str, dataset: InstructDataset, config: FinetuneConfig, tokenizer: Tokenizer
) -> ReadDataset[Any]:
    """Read one dataset to its end, also where a run would end at its first bad record."""
    data = config.data.model_copy(update={"datasets": [dataset], "bad_records": "drop"})
    one: ReadDataset[Any]
    if data.has_pairs:
        (one,) = read_pairs(data, tokenizer, config.model.ctx_len)
    else:
        (one,) = read_conversations(data, tokenizer)
    n_bad = one.left_out[UNUSABLE] + one.left_out[TOO_LONG_FOR_A_ROW]
    if config.data.bad_records == "refuse" and n_bad:
        first = next(
            one.examples[reason][0] for reason in (UNUSABLE, TOO_LONG_FOR_A_ROW) if one.left_out[reason]
        )
        raise DataError(
            f"data.{setting}: {n_bad:,} of {one.n_records:,} records of {dataset.name} cannot be used, the first is "
            f"{first}"
        )
    return one


def _divide(read: ReadDataset[Any], config: FinetuneConfig) -> Split[Any]:
    """Hold out a part of one dataset, where the settings say so."""
    alone = config.data.model_copy(update={"datasets": [read.dataset], "valid": None})
    return read_split(lambda _: [read], alone, config.trainer.seed)
