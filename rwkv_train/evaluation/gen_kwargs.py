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
    temperature = gen_kwargs.get("temperature", 1.0 if do_sample else 0.0)
    settings = SamplingSettings(
        temperature=float(temperature) if do_sample in (None, True) else 0.0,
        top_p=float(gen_kwargs.get("top_p", 1.0)),
        top_k=gen_kwargs.get("top_k"),
    )
    given = [gen_kwargs[name] for name in _MAX_TOKENS if gen_kwargs.get(name) is not None]
    until = gen_kwargs.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    return GenerationWish(settings, int(given[0]) if given else DEFAULT_MAX_TOKENS, stop)
