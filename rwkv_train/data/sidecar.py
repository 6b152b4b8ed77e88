"""What a token file itself does not say: its tokenizer, its sources, domain and bytes of each document.

``PREFIX.json`` holds the facts about the whole, ``PREFIX.docs.npy`` three numbers for each document.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import TokenizerIdentity

_T = TypeVar("_T")

FORMAT = "rwkv-train-corpus/2"
"""Name of the format, in the JSON file."""

READABLE_FORMATS = ("rwkv-train-corpus/1", FORMAT)
"""The first one does not tell of words, nor of how documents were chosen."""

DOCUMENT_DTYPE = np.dtype([("domain", "<u4"), ("n_bytes", "<i8"), ("n_words", "<i8")])
"""A document: index of its domain in ``Sidecar.domains``, length of its text in UTF-8 bytes, and its words: the
parts between white space as ``re.split(r"\\s+", text)`` counts them, which is lm-evaluation-harness's way."""

_DOCUMENT_DTYPE_1 = np.dtype([("domain", "<u4"), ("n_bytes", "<i8")])  # of the first format


class DomainTotals(NamedTuple):
    """Sums over the documents of one domain."""

    name: str
    n_documents: int
    n_tokens: int
    """End tokens included."""
    n_bytes: int
    """Length of the texts in UTF-8."""
    n_words: int | None = None
    """Words as in ``DOCUMENT_DTYPE``; None in the first format."""


class Source(NamedTuple):
    """A file that the corpus was made from."""

    path: str
    n_bytes: int
    sha256: str
    n_without_records: int = 0
    """Files of a folder that were passed over, because they hold no records."""


class Preparation(NamedTuple):
    """How the documents of a corpus were chosen and ordered."""

    settings: Mapping[str, Any] = {}
    """The options of the preparation that were not left as they are, by name."""
    part: str | None = None
    """"train" or "valid" where a held-out part was split off."""
    n_skipped_bad: int = 0
    """Records of the sources that could not be used."""
    first_bad: tuple[str, ...] = ()
    """Where the first few of them are, and why."""
    n_duplicates: Mapping[str, int] = {}
    """Documents that were left out because an earlier one is (nearly) the same, by domain."""
    n_leaked: Mapping[str, int] = {}
    """Documents that were left out of the held-out part because training has much of them, by domain."""


class Sidecar(NamedTuple):
    """Facts about a prepared corpus; the names are those in the JSON file."""

    tokenizer: TokenizerIdentity
    vocab_size: int
    """Of the tokenizer."""
    end_of_document: int
    """The token after each document."""
    dtype: str
    """Type of the ids in the .bin file."""
    n_documents: int
    n_skipped_empty: int
    """Documents of the sources that had no text."""
    n_tokens: int
    """End tokens included."""
    n_bytes: int
    """Length of all texts in UTF-8."""
    max_token: int
    """The largest id that occurs."""
    sha256: str
    """Hash of the .bin file."""
    domains: tuple[DomainTotals, ...]
    """In the order of their first documents."""
    sources: tuple[Source, ...]
    n_words: int | None = None
    """Words of all texts, as in ``DOCUMENT_DTYPE``; None in the first format."""
    preparation: Preparation = Preparation()

    def to_json(self) -> str:
        """Return the content of ``PREFIX.json``."""
        fields = self._asdict() | {
            "tokenizer": self.tokenizer._asdict(),
            "domains": [domain._asdict() for domain in self.domains],
            "sources": [_source_fields(source) for source in self.sources],
            "preparation": self.preparation._asdict(),
        }
        return json.dumps({"format": FORMAT, **fields}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, content: bytes, where: str) -> "Sidecar":
        """Read the content of ``PREFIX.json``.

        Args:
            content: the file.
            where: its name, for errors.

        Raises:
            DataError: it is not what :meth:`to_json` writes.
        """
        try:
            fields: dict[str, Any] = json.loads(content)
            found = fields.pop("format")
            if found not in READABLE_FORMATS:
                raise DataError(f"{where} has the format '{found}', wanted '{FORMAT}'")
            _require_types(cls, fields)
            fields["tokenizer"] = _record(TokenizerIdentity, fields["tokenizer"])
            fields["domains"] = tuple(_record(DomainTotals, domain) for domain in fields["domains"])
            fields["sources"] = tuple(_record(Source, source) for source in fields["sources"])
            fields["preparation"] = _preparation(**fields.get("preparation", {}))
            sidecar = cls(**fields)
            _require_sums(sidecar)
            return sidecar
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{where} is not the sidecar of a prepared corpus ({error}); prepare the corpus again, or "
                "move the file away to use the .bin/.idx pair without it"
            ) from error


def _source_fields(source: Source) -> Mapping[str, Any]:
    fields = source._asdict()
    if not source.n_without_records:  # readers of before do not know it
        del fields["n_without_records"]
    return fields


def _preparation(*, first_bad: Sequence[str] = (), **fields: Any) -> Preparation:
    return _record(Preparation, {"first_bad": tuple(first_bad), **fields})


def _record(kind: type[_T], fields: Mapping[str, Any]) -> _T:
    _require_types(kind, fields)
    return kind(**fields)


def _require_types(kind: type, fields: Mapping[str, Any]) -> None:
    """Refuse a value that is not of its field's type: it would be noticed where the corpus is used, or never."""
    for name, hint in get_type_hints(kind).items():
        if name in fields and hint in _WANTED:
            is_right, wanted = _WANTED[hint]
            if not is_right(fields[name]):
                raise ValueError(f"{name} must be {wanted}, found {fields[name]!r:.40}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_WANTED: Mapping[Any, tuple[Callable[[Any], bool], str]] = {
    int: (_is_count, "a whole number from 0 on"),
    int | None: (lambda value: value is None or _is_count(value), "a whole number from 0 on, or null"),
    str: (_is_text, "a string"),
    str | None: (lambda value: value is None or _is_text(value), "a string or null"),
    tuple[str, ...]: (lambda value: all(map(_is_text, value)), "a list of strings"),
    Mapping[str, int]: (
        lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
        "an object of whole numbers",
    ),
    Mapping[str, Any]: (lambda value: isinstance(value, dict), "an object"),
}
"""What a field of each type may hold, and how that is called."""


def _require_sums(sidecar: Sidecar) -> None:
    domains = sidecar.domains
    if len({domain.name for domain in domains}) != len(domains):
        raise ValueError("two domains have the same name")
    for name in ("n_documents", "n_tokens", "n_bytes", "n_words"):
        total, parts = getattr(sidecar, name), [getattr(domain, name) for domain in domains]
        is_known = None not in (total, *parts)
        if is_known and sum(parts) != total:
            raise ValueError(f"{name} is {total}, and {sum(parts)} over all domains")


class DomainCounter:
    """Sums up documents by domain and numbers the domains in the order of their first documents.

    Args:
        names: of the domains, in another numbering.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._numbers = np.full(len(names), -1, np.int64)
        self._order: list[int] = []
        self._sums = np.zeros((len(names), 4), np.int64)

    def add(self, domains: npt.NDArray[np.integer], counts: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Count documents.

        Args:
            domains: index in ``names`` of each document's, ``[n]``.
            counts: tokens, bytes and words of each, ``[n, 3]``.

        Returns:
            The domains in the new numbering, ``[n]``.
        """
        np.add.at(self._sums[:, 0], domains, 1)
        np.add.at(self._sums[:, 1:], domains, counts)
        found, firsts = np.unique(domains, return_index=True)
        for domain in found[np.argsort(firsts)].tolist():
            if self._numbers[domain] < 0:
                self._numbers[domain] = len(self._order)
                self._order.append(domain)
        numbers: npt.NDArray[np.int64] = self._numbers[domains]
        return numbers

    def totals(self) -> tuple[DomainTotals, ...]:
        """Return the sums so far, in the new numbering."""
        return tuple(DomainTotals(self._names[index], *self._sums[index].tolist()) for index in self._order)


class DocumentTableWriter:
    """Write ``PREFIX.docs.npy`` piece by piece; numpy leaves room in its header for the final number.

    Args:
        file: opened for writing, empty.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._n_documents = 0
        self._write_header()

    def add(self, documents: npt.NDArray[np.void]) -> None:
        """Append documents, ``[n]`` of ``DOCUMENT_DTYPE``."""
        self._file.write(documents.tobytes())
        self._n_documents += len(documents)

    def finish(self) -> None:
        """Set the number of documents in the header."""
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        header = {
            "descr": npy.dtype_to_descr(DOCUMENT_DTYPE),
            "fortran_order": False,
            "shape": (self._n_documents,),
        }
        npy.write_array_header_1_0(self._file, header)


def read_document_table(path: str) -> npt.NDArray[np.void]:
    """Map ``PREFIX.docs.npy``: records of ``DOCUMENT_DTYPE``, without ``n_words`` in the first format.

    Raises:
        DataError: it is missing, cut off or another table.
    """
    try:
        table: npt.NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"cannot read {path}: {reason}; prepare the corpus again") from error
    if table.dtype not in (DOCUMENT_DTYPE, _DOCUMENT_DTYPE_1) or table.ndim != 1:
        raise DataError(f"{path} is a table of {table.dtype}, wanted {DOCUMENT_DTYPE}")
    return table
