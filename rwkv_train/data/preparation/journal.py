"""What an unfinished preparation knows of itself, and whether what is asked for now is the same preparation."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rwkv_train.data.sources.base import Source, cannot_read
from rwkv_train.errors import DataError

Json = dict[str, Any]

_FORMAT = "rwkv-train-unfinished/1"
_INPUTS = "inputs"
_COUNTS = ("n_source_bytes", "n_documents", "n_tokens", "n_empty", "n_bad", "left_out")
_LISTS = ("domains", "first_bad")  # which only grow


@dataclass
class Journal:
    """What is done; the names are those in the file."""

    reading: Json
    """Tokenizer, inputs and options that the tokens depend on."""
    dtype: str
    """Of the ids."""
    source: int = 0
    """Index of the input that is read."""
    block: int = 0
    """Number of its next block."""
    sources: list[Json] = field(default_factory=list)
    """Path, size and hash of the inputs that are done."""
    ends: list[Json] = field(default_factory=list)
    """The counts below, and the lengths of the lists, at the end of each input that is done."""
    n_source_bytes: int = 0
    """Bytes of all inputs that are done, as stored."""
    n_documents: int = 0
    n_tokens: int = 0
    domains: list[str] = field(default_factory=list)
    n_empty: int = 0
    n_bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    placing: Json | None = None
    """When all files are made: what they were ``chosen`` by, and the ``moves`` to their places."""

    def with_source_done(self, described: Json) -> "Journal":
        """Note that an input is read to its end."""
        end = {name: getattr(self, name) for name in _COUNTS}
        end |= {name: len(getattr(self, name)) for name in _LISTS}
        sources, ends = [*self.sources, described], [*self.ends, end]
        return replace(self, sources=sources, ends=ends, source=self.source + 1, block=0)

    def back_to(self, n_sources: int, reading: Json) -> "Journal":
        """Return what there was when so many inputs, one at least, were done."""
        end = self.ends[n_sources - 1]
        return Journal(
            reading,
            self.dtype,
            source=n_sources,
            sources=self.sources[:n_sources],
            ends=self.ends[:n_sources],
            **{name: end[name] for name in _COUNTS},
            **{name: getattr(self, name)[: end[name]] for name in _LISTS},
        )

    def to_json(self) -> str:
        """Return the content of the file."""
        fields = asdict(self)
        return json.dumps({"format": _FORMAT, "check": _check(fields), **fields}, indent=1)

    @classmethod
    def from_json(cls, path: Path) -> "Journal":
        """Read the file.

        Raises:
            DataError: it is not what :meth:`to_json` wrote.
        """
        try:
            fields = json.loads(path.read_bytes())
            if fields.pop("format") != _FORMAT:
                raise ValueError("it is of another version")
            if fields.pop("check") != _check(fields):
                raise ValueError("it is damaged")
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path} is not the journal of an unfinished preparation ({error}): remove {path.parent}"
            ) from error


def journal_for(journal: Journal, reading: Json, where: Path, *, overwrite: bool) -> Journal:
    """Return the journal to go on with.

    Args:
        journal: what an earlier preparation left.
        reading: what is asked for now.
        where: the folder of both, for the error.
        overwrite: if inputs have changed, go back to the end of those before them; if other things have, begin anew.

    Raises:
        DataError: ``reading`` is not that of the journal, and is not to be overwritten.
    """
    reading = json.loads(json.dumps(reading))
    differences = _differences(journal.reading, reading)
    if not differences:
        return journal
    n_same = 0
    if journal.placing is None and not _differences(
        journal.reading, reading | {_INPUTS: journal.reading[_INPUTS]}
    ):
        pairs = zip(journal.reading[_INPUTS], reading[_INPUTS], strict=False)
        is_same = [before == now for before, now in pairs]
        n_same = min([*is_same, False].index(False), journal.source)
    if not overwrite:
        keeps = f", which keeps what is done of the first {n_same}" if n_same else ""
        raise DataError(
            f"{where} holds an unfinished preparation of other things: {'; '.join(differences)}. Give the same command "
            f"again to go on with it, or --overwrite to begin anew{keeps}"
        )
    return journal.back_to(n_same, reading) if n_same else Journal(reading, journal.dtype)


def mark_of(source: Source) -> str:
    """Return a mark that changes when an input is written again: size and time of its files.

    Raises:
        DataError: a file is gone.
    """
    facts = hashlib.blake2b(digest_size=8)
    n_bytes = 0
    files = source.files()
    for file in files:
        try:
            told = file.stat()
        except OSError as error:
            raise cannot_read(file, error) from error
        facts.update(os.fsencode(file) + b"\0%d %d\0" % (told.st_size, told.st_mtime_ns))
        n_bytes += told.st_size
    return f"{n_bytes} bytes in {len(files)} files, {facts.hexdigest()}"


def _check(fields: Json) -> str:
    """Return a hash by which a journal that was changed or damaged is known."""
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


def _differences(before: Json, now: Json) -> list[str]:
    """Say what is not the same, in the words of the journal."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name}.{line}" for line in _differences(old, new)]
        elif old != new:
            found.append(f"{name} was {old}, is {new}")
    return found
