"""What can be asked of a preparation, and which part of it an unfinished one is bound to."""

from typing import Any, NamedTuple

from rwkv_train.data.sources.base import SourceOptions
from rwkv_train.errors import ConfigError

DEDUP_METHODS = ("exact", "minhash")
"""Ways to find duplicates."""


class PrepareOptions(NamedTuple):
    """How documents are read, chosen and ordered."""

    source: SourceOptions = SourceOptions()
    """How the inputs are read."""
    domains: tuple[str, ...] | None = None
    """Take documents of these domains only; ``None``: of all."""
    skip_bad: bool = False
    """Count and report records that cannot be used, instead of ending at the first one."""
    dedup: str | None = None
    """A name from ``DEDUP_METHODS``: of documents with the same text, or nearly the same, only the first stays."""
    valid_fraction: float | None = None
    """Share of the documents that is held out, chosen by the hash of their text."""
    max_leak: float = 0.1
    """A held-out document is left out if training has more than this share of its 16-word probes; 1: no check."""
    shuffle: int | None = None
    """Seed of the order of the documents; ``None``: as they are read."""

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ConfigError: a value is out of its range, with its option.
        """
        if self.dedup is not None and self.dedup not in DEDUP_METHODS:
            raise ConfigError(f"--dedup must be one of {', '.join(DEDUP_METHODS)}, found '{self.dedup}'")
        if self.valid_fraction is not None and not 0 < self.valid_fraction < 1:
            raise ConfigError(f"--valid-fraction must be between 0 and 1, found {self.valid_fraction}")
        if not 0 <= self.max_leak <= 1:
            raise ConfigError(f"--max-leak must be from 0 to 1, found {self.max_leak}")
        if self.max_leak != PrepareOptions().max_leak and self.valid_fraction is None:
            raise ConfigError("--max-leak is about the held-out part: give --valid-fraction too")
        if self.domains is not None and not self.domains:
            raise ConfigError("--domains names no domain")

    def reading(self) -> dict[str, Any]:
        """Return, as JSON's types, what decides over the tokens of the documents that are read."""
        return {
            **self.source._asdict(),
            "domains": self.domains and sorted(self.domains),
            "signatures": self.dedup == "minhash",
        }

    def choosing(self) -> dict[str, Any]:
        """Return, as JSON's types, what decides which of the documents are written, and in which order."""
        return {
            "dedup": self.dedup,
            "valid_fraction": self.valid_fraction,
            "max_leak": None if self.valid_fraction is None else self.max_leak,
            "shuffle": self.shuffle,
        }

    def given(self) -> dict[str, Any]:
        """Return what is not left as it is, for the sidecar."""
        told = {**self.reading(), **self.choosing()}
        usual = {**PrepareOptions().reading(), **PrepareOptions().choosing()}
        del told["signatures"]
        return {name: value for name, value in told.items() if value != usual[name]}
