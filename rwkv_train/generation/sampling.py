"""The choice of the next token: logits in, a token id out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_train.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn from the model's prediction.

    Raises:
        ConfigError: a value is outside its range.
    """

    temperature: float = 1.0
    """Logits are divided by it: below 1 more careful, above 1 more varied, 0 always takes the best token."""
    top_p: float = 0.9
    """Nucleus: only the fewest best tokens whose probabilities sum to this at least; 1 keeps all of them."""
    top_k: int | None = None
    """Only this many best tokens; None: no such limit."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token whose count is above 0, that is, which was already generated."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token times its count: once for each time that it was generated."""
    penalty_decay: float = 0.996
    """Each generated token first multiplies all counts by this; 1 never forgets."""

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, self.temperature >= 0, "a number of at least 0")
        _require("top_p", self.top_p, 0 <= self.top_p <= 1, "a number from 0 to 1")
        _require(
            "top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1, or left out for no limit"
        )
        _require("presence_penalty", self.presence_penalty, True, "a number")
        _require("frequency_penalty", self.frequency_penalty, True, "a number")
        _require("penalty_decay", self.penalty_decay, 0 <= self.penalty_decay <= 1, "a number from 0 to 1")


def sample(logits: Tensor, settings: SamplingSettings, generator: torch.Generator, counts: Tensor) -> int:
    """Draw the next token.

    Args:
        logits: the model's prediction, ``[V]`` float32 on the CPU.
        settings: temperature, limits, penalties.
        generator: source of the random number, on the CPU; untouched where nothing is random.
        counts: how often each token was generated so far, decayed, ``[V]`` float32; see :func:`count_token`.

    Returns:
        A token id in ``[0, V)``.

    Raises:
        CheckpointError: the logits are not finite.
    """
    if _is_greedy(settings):
        return int(_penalized(logits, settings, counts).argmax())
    return int(torch.multinomial(next_probabilities(logits, settings, counts), 1, generator=generator))


def next_probabilities(logits: Tensor, settings: SamplingSettings, counts: Tensor) -> Tensor:
    """Compute the distribution from which :func:`sample` draws.

    Penalties, temperature, top_k and top_p are applied in this order, each to what the one before left,
    renormalized: ``top_p`` is a share of the ``top_k`` tokens at the given temperature. The best token is
    always kept; of equal tokens the lowest ids are the better ones.

    Args:
        logits: ``[V]`` float32 on the CPU.
        settings: temperature, limits, penalties.
        counts: decayed counts of the generated tokens, ``[V]`` float32.

    Returns:
        Probabilities that sum to 1, ``[V]`` float64.

    Raises:
        CheckpointError: the logits are not finite.

    Source:
        Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv:1904.09751 (top_p).
    """
    best_first, order = torch.sort(_penalized(logits, settings, counts), descending=True, stable=True)
    probabilities = torch.zeros(len(logits), dtype=torch.float64)
    if settings.temperature == 0:
        probabilities[order[0]] = 1
        return probabilities

    best_first = best_first[: settings.top_k].to(torch.float64)  # float32 sums of 65,536 terms would drift
    kept = torch.softmax((best_first - best_first[0]) / settings.temperature, dim=0)
    if settings.top_p < 1:
        outside = kept.cumsum(0) >= settings.top_p
        kept[1:] *= ~outside[:-1]  # the token that reaches top_p is the last one inside
    probabilities[order[: settings.top_k]] = kept / kept.sum()
    return probabilities


def count_token(counts: Tensor, token: int, settings: SamplingSettings) -> Tensor:
    """Return the counts after ``token`` was generated: all decayed, then its own one higher, ``[V]``."""
    counts = counts * settings.penalty_decay
    counts[token] += 1
    return counts


def _penalized(logits: Tensor, settings: SamplingSettings, counts: Tensor) -> Tensor:
    best = float(logits.max())  # NaN wherever one of them is
    if not math.isfinite(best):
        raise CheckpointError(
            f"the model's best logit is {best}, not a finite number: its weights are damaged, or its "
            "numbers are too large for the dtype (try float32)"
        )
    if not settings.presence_penalty and not settings.frequency_penalty:
        return logits
    return logits - settings.presence_penalty * (counts > 0) - settings.frequency_penalty * counts


def _is_greedy(settings: SamplingSettings) -> bool:
    return settings.temperature == 0 or settings.top_k == 1 or settings.top_p == 0


def _require(name: str, value: float | None, is_right: bool, wanted: str) -> None:
    if not is_right or (value is not None and not math.isfinite(value)):
        raise ConfigError(f"{name} is {value}; it must be {wanted}")
