"""The built-in corpus: English and Python text that every machine with Python has. Nothing is downloaded.

"prose" is the language reference that ``help()`` shows (pydoc's topics) and the docstrings of each module of
the standard library; "code" is the modules' source. For one version of Python the text is the same
everywhere, except where a distribution leaves modules out.

Validation holds documents that training has nothing of: a module's source and its docstrings fall on the
same side, and so do all documents that share a longer passage.
"""

import ast
import hashlib
import json
import logging
import os
import platform
import re
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import zstandard
from filelock import FileLock

from rwkv_train.data.atomic import AtomicFiles
from rwkv_train.data.binidx import add_suffix
from rwkv_train.data.prepare import PreparedSummary, prepare_data
from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

CORPUS_VERSION = 1
"""Raised whenever the text of the corpus changes: prepared copies of another version are not used."""

BUILTIN = "builtin"
"""What stands for this corpus where a file or a prefix is asked for."""

SPLITS = ("train", "valid")

MIN_CHARACTERS = 200
"""Shorter documents (empty ``__init__.py`` files, lone sentences) are left out."""

_VALID_SHARE = 0.04  # of the bytes of the topics and of the modules
_SHARED_CHARACTERS = 150

# What not every installation has, is a copy of other text, or is a table rather than text.
_LEFT_OUT_FOLDERS = {
    "__phello__", "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idle_test", "idlelib",
    "lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo",
}  # fmt: skip
_LEFT_OUT_FILES = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py|turtle\.py|entities\.py")
_SURROGATE = re.compile("[\ud800-\udfff]")  # a docstring can spell one; it is no character


class _Piece(NamedTuple):
    """One document of the corpus."""

    origin: str
    """The topic or the module's file; the documents of one origin stay together."""
    domain: str
    text: str


def write_builtin_corpus(folder: Path) -> dict[str, Path]:
    """Write the built-in corpus as Pile-style JSON lines, once.

    Files that exist are complete and are kept. Any number of processes may ask at the same time.

    Args:
        folder: where ``train.jsonl.zst`` and ``valid.jsonl.zst`` shall be.

    Returns:
        The two files, by the names ``"train"`` and ``"valid"``.

    Raises:
        DataError: this Python has no sources of its standard library, or the folder cannot be written.
    """
    paths = {split: folder / f"{split}.jsonl.zst" for split in SPLITS}
    if all(path.exists() for path in paths.values()):
        return paths
    with _lock(folder):
        if not all(path.exists() for path in paths.values()):
            _write_corpus(paths, overwrite=True)
    return paths


def builtin_folder(cache_dir: Path) -> Path:
    """Return the folder of the built-in corpus of this version of Python within a cache."""
    version = f"{platform.python_implementation().lower()}-{platform.python_version()}"
    return cache_dir.expanduser() / f"builtin-{CORPUS_VERSION}-{version}"


def ensure_builtin(cache_dir: Path, tokenizer: Tokenizer) -> dict[str, Path]:
    """Prepare the built-in corpus for a tokenizer, once for this version of Python.

    Args:
        cache_dir: folder that keeps it from run to run.
        tokenizer: what cuts the texts.

    Returns:
        The prefixes of the two prepared corpora, by the names ``"train"`` and ``"valid"``.

    Raises:
        DataError: as :func:`write_builtin_corpus`.
    """
    folder = builtin_folder(cache_dir)
    prepared = folder / f"{Path(tokenizer.identity.name).stem}-{tokenizer.identity.sha256[:12]}"
    prefixes = {split: prepared / split for split in SPLITS}
    if all(add_suffix(prefix, ".idx").exists() for prefix in prefixes.values()):
        return prefixes
    sources = write_builtin_corpus(folder)
    with _lock(prepared):
        for split, prefix in prefixes.items():
            if not add_suffix(prefix, ".idx").exists():
                # Without the index, files of that name are the rest of an interrupted attempt.
                prepare_data([sources[split]], tokenizer, prefix, overwrite=True)
    return prefixes


def prepare_builtin(
    output_prefix: Path, tokenizer: Tokenizer, *, overwrite: bool = False
) -> dict[str, PreparedSummary]:
    """Write the built-in corpus and prepare it, both beside ``output_prefix``.

    Args:
        output_prefix: ``PREFIX-train.jsonl.zst``, ``PREFIX-train.bin`` and so on are written, and the same
            with ``-valid``.
        tokenizer: what cuts the texts.
        overwrite: replace files that exist, instead of refusing.

    Raises:
        DataError: as :func:`write_builtin_corpus`; or a file exists.
    """
    prefixes = {split: add_suffix(output_prefix, f"-{split}") for split in SPLITS}
    paths = {split: add_suffix(prefix, ".jsonl.zst") for split, prefix in prefixes.items()}
    _write_corpus(paths, overwrite=overwrite)
    return {
        split: prepare_data([paths[split]], tokenizer, prefix, overwrite=overwrite)[0]
        for split, prefix in prefixes.items()
    }


def _write_corpus(paths: dict[str, Path], *, overwrite: bool) -> None:
    with AtomicFiles(list(paths.values()), overwrite=overwrite) as files:
        logger.info("writing the built-in corpus to %s", paths["train"].parent)
        compressor = zstandard.ZstdCompressor(level=9)
        for split, pieces in _split(_pieces()).items():
            # In the order of a hash: the head of the file is a sample of the whole.
            with compressor.stream_writer(files[paths[split]], closefd=False) as stream:
                for piece in sorted(pieces, key=lambda piece: _hash(piece.text)):
                    stream.write(_json_line(piece))


def _json_line(piece: _Piece) -> bytes:
    source = f"python-{platform.python_version()}:{piece.origin}"
    record = {"text": piece.text, "meta": {"pile_set_name": piece.domain, "source": source}}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _pieces() -> list[_Piece]:
    """Collect all documents, each text once."""
    pieces: dict[str, _Piece] = {}
    for piece in [*_topics(), *_modules(Path(os.__file__).parent)]:
        if len(piece.text) >= MIN_CHARACTERS and not _SURROGATE.search(piece.text):
            pieces.setdefault(piece.text, piece)
    return list(pieces.values())


def _topics() -> Iterator[_Piece]:
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - half a megabyte, wanted only here
    except ImportError as error:
        raise DataError(
            "this Python comes without its documentation (the module pydoc_data), so there is no built-in corpus: "
            "install the complete standard library, or train on your own data"
        ) from error
    for name in sorted(topics):
        yield _Piece(f"topic/{name}", "prose", topics[name].strip() + "\n")


def _modules(root: Path) -> Iterator[_Piece]:
    n_modules = 0
    for path in _module_files(root):
        origin = path.relative_to(root).as_posix()
        try:
            with tokenize.open(path) as file:  # the encoding that the file declares
                source = file.read()
            with warnings.catch_warnings(action="ignore"):  # about escapes in old modules
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # not a module of this Python, or not text
            continue
        n_modules += 1
        yield _Piece(origin, "code", source)
        yield _Piece(origin, "prose", "\n\n".join(_docstrings(tree)) + "\n")
    if n_modules == 0:
        raise DataError(
            f"this Python comes without the sources of its standard library (looked in {root}), so there is no "
            "built-in corpus: install them, or train on your own data"
        )


def _module_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name not in _LEFT_OUT_FOLDERS and not name.startswith("config-")
        )
        for name in sorted(names):
            if name.endswith(".py") and not _LEFT_OUT_FILES.fullmatch(name):
                yield Path(folder, name)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, in the order of the source."""
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    inner = sorted(
        (node for node in ast.walk(tree) if isinstance(node, documented)), key=lambda node: node.lineno
    )
    for node in (tree, *inner):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring


def _split(pieces: list[_Piece]) -> dict[str, list[_Piece]]:
    """Divide the documents; those that share an origin or a passage stay together."""
    kinds: dict[bool, list[list[_Piece]]] = defaultdict(list)
    for group in _groups(pieces):
        kinds[group[0].origin.startswith("topic/")].append(group)
    train: list[_Piece] = []
    valid: list[_Piece] = []
    for groups in kinds.values():  # topics and modules apart, so that validation has both
        limit = _VALID_SHARE * sum(map(_characters, groups))
        taken = 0
        for group in sorted(groups, key=lambda group: min(_hash(piece.text) for piece in group)):
            # A group of a quarter of the validation text would speak for one topic only.
            fits = taken < 0.9 * limit and _characters(group) <= limit / 4
            (valid if fits else train).extend(group)
            taken += _characters(group) if fits else 0
    return {"train": train, "valid": valid}


def _groups(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Connect the documents of one origin, and origins with a long passage in common."""
    leader: dict[str, str] = {}

    def find(origin: str) -> str:
        while leader.setdefault(origin, origin) != origin:
            origin = leader[origin]
        return origin

    first_with: dict[str, str] = {}
    for piece in pieces:
        for passage in _long_passages(piece.text):
            leader[find(piece.origin)] = find(first_with.setdefault(passage, piece.origin))
    groups: dict[str, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        groups[find(piece.origin)].append(piece)
    return list(groups.values())


def _long_passages(text: str) -> Iterator[str]:
    """Yield each three lines in a row that are long together, without indentation and comment signs."""
    lines = [" ".join(line.replace("#", " ").split()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    for three in zip(lines, lines[1:], lines[2:], strict=False):
        passage = " ".join(three)
        if len(passage) >= _SHARED_CHARACTERS:
            yield passage


def _characters(group: Iterable[_Piece]) -> int:
    return sum(len(piece.text) for piece in group)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _lock(folder: Path) -> AbstractContextManager[object]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock").acquire()
    except OSError as error:
        raise DataError(
            f"cannot write in the folder {folder}: {error.strerror or error}; choose another folder for the "
            "built-in corpus (data.cache_dir)"
        ) from error
