"""How lm-evaluation-harness' tasks say what text they want generated, in our terms."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rwkv_train.errors import ConfigError
from rwkv_train.generation.sampling import SamplingSettings

DEFAULT_MAX_TOKENS = 256
"""The harness' own default."""

_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one thing, the first given one counts, as in the harness."""
_KNOWN = ("until", "do_sample", "temperature", "top_p", "top_k", *_MAX_TOKENS)


class GenerationWish(NamedTuple):
    """What a task wants."""

    settings: SamplingSettings
    max_tokens: int
    stop: tuple[str, ...]
    """The text ends before the first of these."""


def parse_gen_kwargs(gen_kwargs: Mapping[str, Any]) -> GenerationWish:
    """Read a request's ``gen_kwargs``.

    Without ``do_sample`` and without a temperature above 0, the likeliest token is always taken. With
    ``do_sample`` and no temperature, the temperature is 1. There is no limit to the tokens that are drawn from
    unless ``top_p`` or ``top_k`` sets one. Empty stop strings do not count.

    Raises:
        ConfigError: a setting is unknown, so that its effect would be missing, or has no such value.
    """
    unknown = sorted(set(gen_kwargs) - set(_KNOWN))
    if unknown:
        raise ConfigError(
            f"the task's generation_kwargs have '{unknown[0]}', which rwkv-train does not know; it knows "
            f"{', '.join(_KNOWN)}"
        )
    do_sample = gen_kwargs.get("do_sample")
    temperature = _number(gen_kwargs, "temperature", 1.0 if do_sample else 0.0)
    settings = SamplingSettings(
        temperature=temperature if do_sample in (None, True) else 0.0,
        top_p=_number(gen_kwargs, "top_p", 1.0),
        top_k=None if gen_kwargs.get("top_k") is None else int(_number(gen_kwargs, "top_k", 0)),
    )
    names = [name for name in _MAX_TOKENS if gen_kwargs.get(name) is not None]
    max_tokens = _number(gen_kwargs, names[0], 0) if names else DEFAULT_MAX_TOKENS
    if max_tokens < 0:
        raise ConfigError(f"the task's {names[0]} is {max_tokens:g}; it must be at least 0")
    until = gen_kwargs.get("until") or []
    stop = [until] if isinstance(until, str) else until
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
        raise ConfigError(f"the task's until is {until!r}; it must be a text or a list of texts")
    return GenerationWish(settings, int(max_tokens), tuple(filter(None, stop)))


def _number(gen_kwargs: Mapping[str, Any], name: str, default: float) -> float:
    value = gen_kwargs.get(name)
    if value is None:
        return default
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"the task's {name} is {value!r}; it must be a number") from None
