"""Campaign ``inputs``: damaged text and token files of every kind that is read, and what becomes of them.

Each is refused with one line that names the file, or its bad records are counted and passed over, or it is still
valid. Nothing else is raised, nothing hangs, and nothing takes memory that the file's size does not justify.
A corpus prepared from it has just the documents that can be read.
"""

import csv
import gzip
import json
import random
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import zstandard
from pyarrow import parquet as pq

from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.data.preparation.options import PrepareOptions
from rwkv_train.data.prepare import prepare_data
from rwkv_train.data.sources.base import BadRecord, Document, SourceOptions
from rwkv_train.data.sources.opening import open_source
from rwkv_train.errors import DataError
from rwkv_train.tokenizers.bytes import ByteTokenizer
from tests.campaigns.record import Row, outcome

MAX_SECONDS = 20
MAX_GROWTH_BYTES = 256 << 20
"""By which the process may grow at a file of some kilobytes."""


def _documents() -> list[tuple[str, str]]:
    draw = random.Random(11)
    letters = 'abcdefgh ,;"\n\täß日本\U0001f600'
    texts = ["".join(draw.choices(letters, k=draw.randrange(1, 400))) for _ in range(60)]
    return [(text, draw.choice(["Pile-CC", "Github", "ArXiv"])) for text in texts]


DOCUMENTS = _documents()
LINES = [
    json.dumps({"text": text, "meta": {"pile_set_name": domain}}, ensure_ascii=False).encode() + b"\n"
    for text, domain in DOCUMENTS
]


# ---- whole inputs, by writers that are not ours where there are such


def write_lines(folder: Path) -> Path:
    (folder / "x.jsonl").write_bytes(b"".join(LINES))
    return folder / "x.jsonl"


def write_zst(folder: Path) -> Path:
    """Some frames with a checksum and some without."""
    frames = [
        zstandard.ZstdCompressor(write_checksum=start % 20 == 0).compress(b"".join(LINES[start : start + 10]))
        for start in range(0, len(LINES), 10)
    ]
    (folder / "x.jsonl.zst").write_bytes(b"".join(frames))
    return folder / "x.jsonl.zst"


def write_gz(folder: Path) -> Path:
    members = [b"".join(LINES[start : start + 20]) for start in range(0, len(LINES), 20)]
    (folder / "x.jsonl.gz").write_bytes(b"".join(map(gzip.compress, members)))
    return folder / "x.jsonl.gz"


def write_parquet(folder: Path) -> Path:
    texts, domains = zip(*DOCUMENTS, strict=True)
    table = pa.table({"text": texts, "meta": [{"pile_set_name": domain} for domain in domains]})
    pq.write_table(table, folder / "x.parquet", row_group_size=25)
    return folder / "x.parquet"


def write_csv(folder: Path) -> Path:
    with (folder / "x.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "meta"), *DOCUMENTS])
    return folder / "x.csv"


def write_texts(folder: Path) -> Path:
    for number, (text, domain) in enumerate(DOCUMENTS):
        path = folder / "x" / domain / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "x"


def write_pair(folder: Path) -> Path:
    with TokenFileWriter(folder / "x", np.uint16) as writer:
        for text, _ in DOCUMENTS:
            writer.add_document(np.array([*(byte + 1 for byte in text.encode()), 0], np.uint16))
    return folder / "x.idx"


class InputFormat(NamedTuple):
    """A kind of input."""

    write: Callable[[Path], Path]
    n_variants: int
    options: SourceOptions = SourceOptions()


FORMATS = {
    "csv": InputFormat(write_csv, 60),
    "folder of text": InputFormat(write_texts, 20),
    "gz": InputFormat(write_gz, 50),
    "lines": InputFormat(write_lines, 120),
    "pair": InputFormat(write_pair, 100, SourceOptions(pair_tokenizer="bytes")),
    "parquet": InputFormat(write_parquet, 80),
    "zst": InputFormat(write_zst, 70),
}

# ---- damage

_BAD_LINES = [
    b"oops",
    b"null",
    b"[]",
    b"{}",
    b'{"text": 5}',
    b'{"text": ""}',
    b'{"text": "\\ud800"}',
    b'{"text": "x", "meta": {"pile_set_name": "\\ud800"}}',
    b'{"text": "x", "n": ' + b"7" * 5_000 + b"}",
    b"[" * 100_000,
    b'"',
    b"\xff\xfe\x00",
    b"\0" * 50,
]
_NUMBERS = [0, 1, 6, 7, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
_HEADER_OF_INDEX = [(9, "<Q"), (17, "<B"), (18, "<Q"), (26, "<Q"), (34, "<i"), (38, "<i")]
_KINDS = [
    "cut",
    "flip",
    "flip",
    "zeros",
    "noise",
    "insert",
    "hole",
    "swap",
    "twice",
    "line",
    "number",
    "empty",
    "gone",
]


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file in one of several ways and say which."""
    content = path.read_bytes()
    kind = draw.choice(_KINDS)
    at, other = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    end = min(at + draw.choice([1, 8, 64, 512]), len(content))
    if kind == "gone":
        path.unlink()
        return kind
    if kind == "number":
        changed = _with_a_number(path, content, draw)
    else:
        changed = {
            "cut": lambda: content[:at],
            "flip": lambda: (
                content[:at]
                + bytes([byte ^ 1 << draw.randrange(8) for byte in content[at : at + 1]])
                + content[at + 1 :]
            ),
            "zeros": lambda: content[:at] + bytes(end - at) + content[end:],
            "noise": lambda: content[:at] + draw.randbytes(end - at) + content[end:],
            "insert": lambda: content[:at] + draw.randbytes(end - at) + content[at:],
            "hole": lambda: content[:at] + content[end:],
            "swap": lambda: content[other:] + content[at:other] + content[:at],
            "twice": lambda: content + content[at:],
            "line": lambda: _with_a_line(content, draw),
            "empty": lambda: b"",
        }[kind]()
    path.write_bytes(changed)
    return kind


def _with_a_line(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    lines.insert(draw.randrange(len(lines)), draw.choice(_BAD_LINES))
    return b"\n".join(lines)


def _with_a_number(path: Path, content: bytes, draw: random.Random) -> bytes:
    """Write a number somewhere, in an index where it has a meaning: a count, a type's code, a version."""
    number = draw.choice(_NUMBERS)
    offset, form = draw.randrange(max(len(content) - 8, 1)), "<Q"
    if path.suffix == ".idx":
        offset, form = draw.choice(_HEADER_OF_INDEX)
    elif path.suffix == ".parquet" and draw.random() < 0.3:
        offset, form = len(content) - 8, "<I"  # length of the footer
    elif path.suffix == ".zst":
        offset, form = 4 + draw.randrange(3), "<B"  # what follows, size of the window
    size = struct.calcsize(form)
    packed = (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return content[:offset] + packed + content[offset + size :]


# ---- the trial


class InputsTrial:
    """Damages inputs of one format at a time.

    Args:
        work: folder for them.
    """

    def __init__(self, work: Path) -> None:
        self._work = work

    def run(self, name: str, n_variants: int | None = None) -> Row:
        """Try variants of a format; return its row."""
        folder = self._work / name.replace(" ", "-")
        n_variants = n_variants or FORMATS[name].n_variants
        ends: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        problems = []
        most_growth = 0
        self._read_whole(name, folder)
        for seed in range(n_variants):
            draw = random.Random(f"{name} {seed}")
            source = self._write(name, folder)
            damaged = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
            kind = damage(damaged, draw)
            kinds[kind] += 1
            before = _forget_peak()
            end, problem = _end(name, source, damaged, folder / "made" / "corpus")
            growth = _status_bytes("VmHWM") - before
            most_growth = max(most_growth, growth)
            ends[end] += 1
            if problem:
                problems.append(f"seed {seed} ({kind}): {problem}")
            if growth > MAX_GROWTH_BYTES:
                problems.append(f"seed {seed} ({kind}): it took {growth} bytes")
        if not problems:
            shutil.rmtree(folder)
        return {
            "name": name,
            "variants": n_variants,
            "kinds": dict(sorted(kinds.items())),
            "ends": dict(sorted(ends.items())),
            "largest_growth_mb": round(most_growth / 1e6, 1),
            "outcome": outcome(problems),
        }

    def _write(self, name: str, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return FORMATS[name].write(folder)

    def _read_whole(self, name: str, folder: Path) -> None:
        """Read an undamaged one: the trial says nothing if that fails, and later ones find all libraries loaded."""
        found, bad = read_all(self._write(name, folder), FORMATS[name].options)
        wanted = {text for text, _ in DOCUMENTS}
        assert not bad, bad[:1]
        assert {document.text for document in found} == wanted, f"{name} is not read as it was written"


def read_all(source: Path, options: SourceOptions) -> tuple[list[Document], list[BadRecord]]:
    """Return the documents and the bad records of an input."""
    documents, bad = [], []
    for block in open_source(str(source), options).blocks():
        for record in block.records():
            if isinstance(record, BadRecord):
                bad.append(record)
            else:
                documents.append(record)
    return documents, bad


def _end(name: str, source: Path, damaged: Path, made: Path) -> tuple[str, str | None]:
    """How the reading and the preparing of a damaged input ended, and what is wrong with that."""
    options = FORMATS[name].options
    called = str(source.with_suffix("") if name == "pair" else source)
    try:
        with _time_limit():
            documents, bad = read_all(source, options)
    except DataError as error:
        if called not in str(error) or "\n" in str(error):
            return "refused", f"it said {str(error)!r}"
        return "refused", None if _prepare(source, options, made) is None else "prepared all the same"
    except Exception as error:  # noqa: BLE001 - a traceback is what this campaign looks for
        return "failed", f"{type(error).__name__}: {str(error)[:300]}"
    wrong = [str(record) for record in bad if "\n" in str(record) or called not in record.where]
    if wrong:
        return "skipped", f"it said {wrong[0]!r}"
    if name == "lines" and (lost := _lost(documents, damaged)):
        return "lost", f"{lost} whole lines were not read"
    n_texts = sum(1 for document in documents if document.text)
    wanted = (n_texts, len(documents) - n_texts, len(bad)) if n_texts else None
    found = _prepare(source, options, made)
    if found != wanted:
        return "lost", f"prepared, skipped empty and bad: {found}, wanted {wanted}"
    return ("bad records counted" if bad else "still valid"), None


def _prepare(source: Path, options: SourceOptions, made: Path) -> tuple[int, int, int] | None:
    """Number of documents that were prepared, that were empty and that were bad; ``None`` if it was refused."""
    chosen = PrepareOptions(source=options, skip_bad=True)
    try:
        with _time_limit():
            (summary,) = prepare_data([source], ByteTokenizer(), made, chosen)
    except DataError:
        return None
    sidecar = summary.sidecar
    return sidecar.n_documents, sidecar.n_skipped_empty, sidecar.preparation.n_skipped_bad


def _lost(documents: list[Document], damaged: Path) -> int:
    """Number of lines that the damage left whole and that were not read."""
    left = Counter(damaged.read_bytes().split(b"\n"))
    text_of = {line.rstrip(b"\n"): text for line, (text, _) in zip(LINES, DOCUMENTS, strict=True)}
    read = Counter(document.text for document in documents)
    return sum(1 for line, text in text_of.items() if read[text] < left[line])


def _forget_peak() -> int:
    """Let the peak of this process' memory be what it holds now; return that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {MAX_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def totals(rows: list[Row]) -> Row:
    """Sum the formats up."""
    ends: Counter[str] = Counter()
    for row in rows:
        ends.update(row["ends"])
    return {
        "formats": len(rows),
        "variants": sum(row["variants"] for row in rows),
        "ends": dict(sorted(ends.items())),
        "largest_growth_mb": max((row["largest_growth_mb"] for row in rows), default=0),
    }
