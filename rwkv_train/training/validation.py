"""The held-out loss during a run, by the same definition as ``rwkv-train eval-ppl``, and a short sample."""

import logging
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any, NamedTuple, Protocol

import torch

from rwkv_train.config.train import TrainConfig
from rwkv_train.data.stored import Corpus, TokenDocument
from rwkv_train.errors import DataError
from rwkv_train.evaluation.perplexity import Reading, evaluate_tokens
from rwkv_train.evaluation.totals import Totals
from rwkv_train.generation.generate import generate
from rwkv_train.generation.sampling import SamplingSettings
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.model_calls import ModelCalls

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.txt"


class Answer(NamedTuple):
    """What the model wrote at a validation."""

    prompt: str
    text: str


class Validation(NamedTuple):
    """The result of one validation."""

    pooled: Totals
    """Sums over all documents."""
    domains: dict[str, Totals]
    """Sums by domain."""
    step: int
    """Steps that the model had learnt."""
    unit: str = "nats/token"
    """Of the loss."""
    metrics: Mapping[str, float] = {}
    """What else was measured: columns of a metrics row, by name."""
    answers: tuple[Answer, ...] = ()
    """What the model wrote."""

    @property
    def loss(self) -> float:
        """Pooled, in its unit."""
        return self.pooled.loss

    def as_metrics(self) -> dict[str, float]:
        """Return the columns of a metrics row; see :func:`metric_columns`."""
        row = dict(self.metrics)
        for domain, totals in self.parts():
            loss, bits_per_byte = _columns(domain)
            if totals.tokens:
                row[loss] = totals.loss
            if totals.bytes:
                row[bits_per_byte] = totals.bits_per_byte
        return row

    def to_json(self) -> dict[str, Any]:
        """Return the sums as JSON's types."""
        return {
            "total": self.pooled._asdict(),
            "domains": {domain: totals._asdict() for domain, totals in self.domains.items()},
        }

    def parts(self) -> list[tuple[str | None, Totals]]:
        """Return the pooled sums under ``None``, which is no domain's name, and those of each domain."""
        return [(None, self.pooled), *self.domains.items()]


class Validator(Protocol):
    """Measures the same held-out data each time."""

    columns: list[str]
    """Names of the metrics of a validation."""
    last: Validation | None
    """The latest result."""

    def run(self, model: LanguageModel, step: int) -> Validation:
        """Measure, log the result and write what the model answers. All processes call this together.

        Raises:
            CheckpointError: a loss is not finite; on all processes.
            OSError: an answer cannot be written; on all processes.
        """
        ...


class CorpusValidator:
    """Scores the same held-out documents each time, each from a fresh state to its end.

    Args:
        corpus: the validation corpus.
        tokenizer: its tokenizer.
        config: the settings of the run.
        processes: the processes of the run; documents are dealt out to them.
        beat: called after each call of the model, as a sign of progress.

    Raises:
        DataError: there is nothing to score.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        config: TrainConfig,
        processes: Processes,
        beat: Callable[[], None],
    ) -> None:
        settings = config.trainer
        documents = select_documents(corpus, tokenizer, settings.val_tokens)
        if not any(len(document.tokens) for document in documents):
            raise DataError(
                f"data.valid ({corpus.prefix}) has no document with text; take another corpus, or set it to null"
            )
        logger.info(
            "validation: %s tokens in %s documents of %s",
            f"{sum(len(document.tokens) for document in documents):,}",
            f"{len(documents):,}",
            corpus.prefix,
        )
        self._domains = sorted({document.domain for document in documents})
        self.columns = metric_columns(self._domains)
        self.last: Validation | None = None
        self._documents = documents[processes.rank :: settings.world_size]
        self._tokenizer = tokenizer
        self._settings = settings
        self._ctx_len = config.model.ctx_len
        self._processes = processes
        self._beat = beat

    def run(self, model: LanguageModel, step: int) -> Validation:
        """Score the documents, log the result and write a sample. All processes call this together.

        Raises:
            CheckpointError: a loss is not finite; on all processes.
            OSError: the sample cannot be written; on all processes.
        """
        model.eval()
        calls = ModelCalls(model, self._processes, together=self._settings.is_sharded, beat=self._beat)
        by_domain: dict[str, Totals] = {}
        with self._processes.failing_together(), calls.finished_by_all():
            reading = Reading(
                prefix_token=self._tokenizer.end_of_document,
                # What fits in memory for training fits here. The result does not depend on either.
                batch_size=self._settings.micro_batch_size,
                chunk_len=self._ctx_len,
            )
            report = evaluate_tokens(calls.as_model(), self._documents, reading)
            by_domain = {domain: sums.totals for domain, sums in report.domains.items()}
        sums = torch.tensor(
            [
                [list(part.get(domain, Totals())) for domain in self._domains]
                for part in self._processes.gather(by_domain)
            ],
            dtype=torch.float64,
        ).sum(dim=0)
        totals = {
            domain: Totals(int(documents), int(tokens), int(n_bytes), int(words), nats)
            for domain, (documents, tokens, n_bytes, words, nats) in zip(
                self._domains, sums.tolist(), strict=True
            )
        }
        pooled = Totals()
        for part in totals.values():
            pooled += part
        self.last = Validation(pooled, totals, step)
        logger.info("step %d: validation %s", step, _one_line(self.last))
        with self._processes.failing_together(), calls.finished_by_all():
            self._write_sample(calls.as_model(), step)
        model.train()
        return self.last

    def _write_sample(self, model: LanguageModel, step: int) -> None:
        if not self._settings.sample_tokens:
            return
        pieces = generate(
            model,
            self._tokenizer,
            self._settings.sample_prompt,
            SamplingSettings(),
            max_tokens=self._settings.sample_tokens,
            seed=self._settings.seed,
        )
        text = "".join(pieces)
        if self._processes.is_first:
            with (self._settings.run_folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.write(f"--- step {step}\n{self._settings.sample_prompt}{text}\n")


def metric_columns(domains: list[str]) -> list[str]:
    """Return the names of the metrics of a validation over these domains."""
    return [column for domain in [None, *domains] for column in _columns(domain)]


def select_documents(corpus: Corpus, tokenizer: Tokenizer, n_tokens: int) -> list[TokenDocument]:
    """Take the head of each domain, as many tokens as its share of ``n_tokens``.

    The last document of a domain is cut where its share ends. A corpus that is smaller is taken whole.
    """
    share = min(1.0, n_tokens / corpus.tokens.n_tokens)
    missing = {domain: ceil(share * count) for domain, count in corpus.tokens_by_domain().items()}
    chosen = []
    for document in corpus.token_documents(tokenizer.end_of_document):
        left = missing[document.domain]
        if left > 0:
            chosen.append(document if len(document.tokens) <= left else _cut(document, tokenizer, left))
            missing[document.domain] -= len(document.tokens) + 1  # the end token counts in the totals
        elif max(missing.values()) <= 0:
            break
    return chosen


def _cut(document: TokenDocument, tokenizer: Tokenizer, n_tokens: int) -> TokenDocument:
    """Return the head of a document; its length in bytes is that of its tokens, if it was known at all."""
    tokens = document.tokens[:n_tokens]
    n_bytes = len(tokenizer.decode_bytes(tokens.tolist())) if document.n_bytes else 0
    return TokenDocument(tokens, document.domain, n_bytes)


def _columns(domain: str | None) -> tuple[str, str]:
    """Return the names of the loss and of the bits per byte of a domain; ``None``: of all text."""
    suffix = "" if domain is None else f"/{domain}"
    return f"val_loss{suffix}", f"val_bits_per_byte{suffix}"


def _one_line(validation: Validation) -> str:
    numbers = [f"loss {validation.loss:.4f} nats/token"]
    numbers += [
        f"{'' if domain is None else domain + ' '}{totals.bits_per_byte:.4f} bits/byte"
        for domain, totals in validation.parts()
        if totals.bytes
    ]
    return ", ".join(numbers)
