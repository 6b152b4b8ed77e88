r"""LAMBADA: the last word of a passage, which a reader of the whole passage can guess.

The protocol is that of RWKV-LM's scripts, whose numbers are published. A passage is cut at its last space into a
context and a word. Both are encoded, separately: the context, and a space with the word. The model reads the prefix
(one end-of-document token, unless another convention is asked for), the context and the word.

- perplexity: ``exp(-mean over passages of the sum of ln p(token) over the word's tokens)``: of a word, not of a token.
- accuracy: the share of passages in which every token of the word is the likeliest one at its place.

lm-evaluation-harness cuts likewise, but encodes context and word together, which some tokenizers make other tokens of.

Source:
    Paperno et al. 2016, "The LAMBADA dataset", arXiv:1606.06031; the usual file is OpenAI's variant, 5153 passages.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_train.errors import DataError
from rwkv_train.evaluation.prefix import Prefix, prefix_tokens
from rwkv_train.evaluation.scoring import BATCH_SIZE, CHUNK_LEN, Sequence, score_sequences
from rwkv_train.models.lm import NO_TARGET, LanguageModel
from rwkv_train.tokenizers import Tokenizer

Z_95 = 1.959963984540054
"""Quantile of the normal distribution: 95 % lie within this many standard deviations."""


class Interval(NamedTuple):
    """Limits of a 95 % confidence interval."""

    low: float
    high: float


class LambadaReport(NamedTuple):
    """How well a model guesses last words."""

    documents: int
    tokens: int
    """Tokens of the last words."""
    nats: float
    """Negative log-likelihood of the last words, summed."""
    ppl: float
    """Perplexity of a word."""
    ppl_interval: Interval | None
    """From the standard error of the mean over passages; ``None`` for one passage, which tells nothing of others."""
    accuracy: float
    """Share of words that greedy decoding gives, 0 to 1."""
    accuracy_interval: Interval
    """Wilson's."""

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON's types; a perplexity beyond the largest float is null."""
        ppl_interval = None if self.ppl_interval is None else list(map(_finite, self.ppl_interval))
        return self._asdict() | {
            "ppl": _finite(self.ppl),
            "ppl_interval": ppl_interval,
            "accuracy_interval": list(self.accuracy_interval),
        }


def evaluate_lambada(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    prefix: Prefix = Prefix.END_OF_DOCUMENT,
    batch_size: int = BATCH_SIZE,
    chunk_len: int = CHUNK_LEN,
    on_document: Callable[[int, int], None] | None = None,
) -> LambadaReport:
    """Measure how well a model guesses the last words of texts.

    Args:
        model: the model, on any device.
        tokenizer: the model's tokenizer.
        texts: the passages.
        prefix: what the model reads before each.
        batch_size: passages that are read side by side; as ``chunk_len``, it changes nothing beyond rounding.
        chunk_len: tokens of each that are read at once.
        on_document: called after each passage with the number of those done and of all.

    Raises:
        ConfigError: a size is below 1.
        DataError: there are no texts, one has no context or no last word, or the tokenizer is not the model's.
        CheckpointError: a loss is not finite.
    """
    passages = [_split(text, number) for number, text in enumerate(texts, start=1)]
    if not passages:
        raise DataError("there is nothing to score: the data holds no passage")
    n_targets = np.zeros(len(passages), dtype=np.int64)

    def sequences() -> Iterator[Sequence]:
        for index, (context, word) in enumerate(passages):
            before, target = tokenizer.encode(context), tokenizer.encode(word)
            n_targets[index] = len(target)
            yield continuation(prefix_tokens(prefix, tokenizer, is_alone=not before) + before, target)

    nats = np.zeros(len(passages))
    is_right = np.zeros(len(passages), dtype=np.bool_)
    scores = score_sequences(model, sequences(), batch_size=batch_size, chunk_len=chunk_len, with_greedy=True)
    for n_done, score in enumerate(scores, start=1):
        assert score.greedy is not None
        nats[score.index] = score.losses.sum(dtype=np.float64)
        is_right[score.index] = score.greedy.sum() == n_targets[score.index]
        if on_document is not None:
            on_document(n_done, len(passages))
    return _report(nats, is_right, int(n_targets.sum()))


def continuation(before: list[int], target: list[int]) -> Sequence:
    """Return the sequence that scores ``target`` after ``before``, of one token at least, which is not scored."""
    assert before
    tokens = np.array([*before, *target], dtype=np.int64)
    targets = tokens[1:].copy()
    targets[: len(before) - 1] = NO_TARGET
    return Sequence(tokens[:-1], targets)


def mean_interval(values: npt.NDArray[np.float64]) -> Interval | None:
    """Return the 95 % interval of a mean by its standard error; ``None`` for a single value."""
    if len(values) < 2:
        return None
    half_width = Z_95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(float(values.mean()) - half_width, float(values.mean()) + half_width)


def share_interval(n_right: int, n: int) -> Interval:
    """Return the 95 % interval of a share, which stays within 0 to 1 and is honest near both.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, spread = n_right / n, Z_95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half_width = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return Interval(max(0.0, centre - half_width), min(1.0, centre + half_width))


def _split(text: str, number: int) -> tuple[str, str]:
    context, space, word = text.rpartition(" ")
    if not context or not word:
        lacks = "no space before its last word" if not space else "no text before or after its last space"
        raise DataError(
            f"passage {number} of the data has {lacks}: {text[-40:]!r}; LAMBADA needs a context and a last word"
        )
    return context, space + word


def _report(nats: npt.NDArray[np.float64], is_right: npt.NDArray[np.bool_], n_tokens: int) -> LambadaReport:
    n, n_right = len(nats), int(is_right.sum())
    interval = mean_interval(nats)
    return LambadaReport(
        documents=n,
        tokens=n_tokens,
        nats=float(nats.sum()),
        ppl=_exp(float(nats.mean())),
        ppl_interval=None if interval is None else Interval(*map(_exp, interval)),
        accuracy=n_right / n,
        accuracy_interval=share_interval(n_right, n),
    )


def _exp(x: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
