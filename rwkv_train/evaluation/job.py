"""An evaluation from the path of a checkpoint to its report, by one process or by several that share the documents."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import torch

from rwkv_train.checkpoints import load_model, merge_into, read_weights
from rwkv_train.checkpoints.fingerprint import fingerprint
from rwkv_train.checkpoints.states import read_state_file
from rwkv_train.checkpoints.tokenizer import choose_tokenizer
from rwkv_train.data.corpus import read_documents
from rwkv_train.data.sources.base import SourceOptions
from rwkv_train.data.sources.opening import open_source
from rwkv_train.errors import ConfigError
from rwkv_train.evaluation.modes import Mode, require_mode
from rwkv_train.evaluation.perplexity import Reading, evaluate, tokenize
from rwkv_train.evaluation.report import Report
from rwkv_train.evaluation.scoring import BATCH_SIZE, CHUNK_LEN, require_sizes
from rwkv_train.evaluation.totals import Totals
from rwkv_train.models.start import FixedStart
from rwkv_train.tokenizers.base import TokenizerIdentity

PrefixChoice = int | Literal["end", "none"]
"""A token id; ``"end"``: the tokenizer's end of document; ``"none"``: nothing stands before a document."""


@dataclass(frozen=True)
class Job:
    """What is to be evaluated on what, and how; small and picklable."""

    checkpoint: str
    """What :func:`~rwkv_train.checkpoints.load_model` takes."""
    data: tuple[str, ...]
    """What :func:`~rwkv_train.data.sources.opening.open_source` takes."""
    tokenizer: str | None = None
    """``None``: the one that the checkpoint names."""
    state: str | None = None
    """File of the state that texts are read from; ``None``: the empty one."""
    options: SourceOptions | None = None
    skip_bad: bool = False
    limit: int | None = None
    """Score only so many documents, the first ones."""
    mode: Mode = Mode.STATEFUL
    window: int | None = None
    prefix: PrefixChoice = "end"
    batch_size: int = BATCH_SIZE
    chunk_len: int = CHUNK_LEN
    dtype: torch.dtype = torch.float32
    adapter: str | None = None
    """Merged into the checkpoint, as :func:`~rwkv_train.checkpoints.merge_into` does."""

    def require_consistent(self, n_processes: int) -> None:
        """Refuse settings that do not go together, before the long work.

        Raises:
            ConfigError: with their names.
        """
        require_mode(self.mode, self.window, has_prefix=self.prefix != "none")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit is {self.limit}; it must be at least 1")
        require_sizes(batch_size=self.batch_size, chunk_len=self.chunk_len, devices=n_processes)
        if n_processes > 1 and self.mode is Mode.STREAM:
            raise ConfigError(
                f"--mode stream reads all documents one after another; --devices {n_processes} has nothing to share"
            )

    def require_readable(self) -> None:
        """Refuse a checkpoint, a tokenizer, a prefix or a state that cannot be used; nothing is computed.

        Raises:
            RwkvTrainError: as :func:`run_job` would.
        """
        weights = read_weights(self.checkpoint)
        if self.adapter is not None:
            weights = merge_into(weights, self.adapter)
        tokenizer = choose_tokenizer(weights, self.tokenizer)
        _prefix_token(self.prefix, tokenizer.end_of_document, weights.config.vocab_size)
        if self.state is not None:
            read_state_file(self.state, weights.config)


class Evaluation(NamedTuple):
    """A report, and what it depends on beside the data."""

    report: Report
    tokenizer: TokenizerIdentity
    prefix_token: int | None


def run_job(
    job: Job,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_document: Callable[[Totals], None] | None = None,
) -> Evaluation:
    """Evaluate the documents that are this process's share: every ``world_size``-th one.

    Args:
        job: what is to be done.
        device: where the model computes.
        rank: the first of the documents.
        world_size: how many processes share them.
        on_document: called with the totals of each document when it is done.

    Raises:
        RwkvTrainError: a setting, the checkpoint or the data are not what they should be.
    """
    job.require_consistent(world_size)
    for name in job.data:
        open_source(name, job.options)  # what is missing is said before the model is loaded
    model, weights = load_model(job.checkpoint, device=device, dtype=job.dtype, adapter=job.adapter)
    if job.state is not None:
        # A model with an adapter is not the base that the file may name.
        base = fingerprint(weights.tensors) if job.adapter is None else None
        model.start = FixedStart(read_state_file(job.state, model.config, base=base))
    tokenizer = choose_tokenizer(weights, job.tokenizer)
    prefix_token = _prefix_token(job.prefix, tokenizer.end_of_document, model.config.vocab_size)
    documents = islice(read_documents(job.data, options=job.options, skip_bad=job.skip_bad), job.limit)
    report = evaluate(
        model,
        tokenize(tokenizer, islice(enumerate(documents), rank, None, world_size)),
        Reading(job.mode, job.window, prefix_token, job.batch_size, job.chunk_len),
        on_document=on_document,
    )
    return Evaluation(report, tokenizer.identity, prefix_token)


def _prefix_token(prefix: PrefixChoice, end_of_document: int, vocab_size: int) -> int | None:
    if prefix == "none":
        return None
    token = end_of_document if prefix == "end" else int(prefix)
    if not 0 <= token < vocab_size:
        raise ConfigError(f"--prefix-token is {token}; the model's tokens are 0 to {vocab_size - 1}")
    return token
