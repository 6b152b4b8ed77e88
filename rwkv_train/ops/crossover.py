"""Measured speeds of the backends on one chip, and which of them say most about a problem.

A table is a JSON file for one chip, which ``rwkv-train bench kernels --tune`` writes::

    {"format": 2, "chip": "NVIDIA H200", "capability": 90, "measured": [
      {"op": "wkv7", "dtype": "bfloat16", "environment": {...}, "repeats": 5, "left_out": [...], "cases": [
        {"head_size": 64, "pass": "forward+backward", "backends": ["cuda_exact", "torch"], "points": [
          {"recurrences": 256, "tokens": 4096, "ms": {"cuda_exact": 9.1, "torch": 210.0}}, ...]}, ...]}, ...]}

An operator is measured in one dtype at a time, and what was measured together stands together: ``environment`` is what
:mod:`rwkv_train.benchmarks.environment` says of it: versions, commit, command. ``backends`` are those that were run. At
each point stands for all backends that were measured there the least time of some calls; the fastest is the one of the
least time.

Two places hold tables: the user's folder, beside the built kernels, and ``rwkv_train/ops/measured``, which is
committed and comes with the wheel. A case that the user's table has is taken from there.
"""

import functools
import json
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_train.ops.build import default_cache_folder

logger = logging.getLogger(__name__)

FORMAT = 2
FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
COMMITTED_FOLDER = Path(__file__).parent / "measured"
TUNE = "rwkv-train bench kernels --tune"
NEVER_MEASURED = "reference"
"""The loop over tokens: far from the fastest, and too slow to be timed at most sizes."""
_DTYPE_OPTIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Name of a dtype in torch -> what ``--dtype`` calls it."""
_LARGEST_SIZE = 1 << 62


class Chip(NamedTuple):
    """What a table was measured on."""

    name: str
    """As :func:`rwkv_train.ops.chip.chip_name` says it."""
    capability: int | None
    """Compute capability of a GPU, 90 for sm_90; ``None`` of a CPU."""

    @property
    def file_name(self) -> str:
        """Name of its table: ``nvidia-h200-sm90.json``."""
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{words}.json" if self.capability is None else f"{words}-sm{self.capability}.json"


class Case(NamedTuple):
    """Problems that differ in their sizes only."""

    op: str
    head_size: int | None
    """Channels in one head (N); ``None`` for an operator without heads."""
    dtype: str
    """Of the values, as torch calls it: ``"bfloat16"``."""
    kind: str
    """``FORWARD`` or ``FORWARD_BACKWARD``."""


class Point(NamedTuple):
    """What was measured at one size, on a plain batch."""

    n_recurrences: int
    """Sequences times heads (B H); of an operator without heads sequences times channels (B C)."""
    n_tokens: int
    """Tokens of a sequence (T)."""
    milliseconds: Mapping[str, float]
    """Name of a backend -> time of a call."""


class MeasuredCase(NamedTuple):
    """What a table has of a case."""

    points: Sequence[Point]
    backends: Collection[str]
    """Those that were run, at some size at least; not all have a time at every point."""
    version: str
    """Of what it was measured with: the commit, outside of a checkout the version of this package."""


class CrossoverTable(NamedTuple):
    """A file that was read."""

    path: Path
    cases: Mapping[Case, MeasuredCase]


class Speeds(NamedTuple):
    """What is known of the backends' speeds for a problem."""

    milliseconds: Mapping[str, float]
    """Name of a backend -> measured time; empty where nothing was measured."""
    said: str
    """At which size, on what and by which table; or why nothing is known."""
    backends: Collection[str] = ()
    """All that were run when this case was measured, also what has no time here."""


def user_folder() -> Path:
    """Return the folder of the user's own tables, beside the built kernels.

    Raises:
        BackendError: the user has no home.
    """
    return default_cache_folder() / "crossover"


@functools.cache
def find_tables(chip: Chip, folders: tuple[Path, ...]) -> tuple[CrossoverTable, ...]:
    """Read a chip's tables, once a process; what is no table of this chip is passed over with a warning.

    Args:
        chip: whose tables.
        folders: where they lie, the one that counts most first.
    """
    found = []
    for path in (folder / chip.file_name for folder in folders):
        try:
            found.append(read_table(path, chip))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            logger.warning(
                "the table of speeds %s is passed over: %s; remove it, or measure again with '%s --overwrite'",
                path,
                why,
                TUNE,
            )
    return tuple(found)


def read_table(path: Path, chip: Chip) -> CrossoverTable:
    """Read the table of a chip.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is damaged, of another format or of another chip.
    """
    content = path.read_bytes()
    return CrossoverTable(path, _read_cases(content, chip))


def read_measured(path: Path, chip: Chip) -> list[dict[str, Any]]:
    """Read the entries of a chip's table as they stand in the file, to be written again beside new ones.

    Raises:
        OSError, ValueError: as :func:`read_table`.
    """
    content = path.read_bytes()
    _read_cases(content, chip)
    return list(json.loads(content)["measured"])


def _read_cases(text: bytes, chip: Chip) -> dict[Case, MeasuredCase]:
    try:
        content = json.loads(text)
        found = content["format"]
        if found != FORMAT:
            raise ValueError(f"its format is {found!r}, and this rwkv-train reads {FORMAT}")
        measured_on = Chip(content["chip"], content["capability"])
        if measured_on != chip:
            raise ValueError(f"it was measured on {_text(measured_on)}, not on {_text(chip)}")
        cases = {}
        for entry in content["measured"]:
            op, dtype, version = entry["op"], entry["dtype"], _version_in(entry["environment"])
            if not isinstance(op, str) or not isinstance(dtype, str):
                raise ValueError(f"it is damaged: an entry is of {op!r} in {dtype!r}")
            for case in entry["cases"]:
                points = [_read_point(point) for point in case["points"]]
                cases[Case(op, case["head_size"], dtype, case["pass"])] = MeasuredCase(
                    points, frozenset(case["backends"]), version
                )
    except KeyError as error:
        raise ValueError(f"it is no table of speeds, or damaged: it has no {error}") from error
    except (TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is no table of speeds, or damaged ({error})") from error
    return cases


def _version_in(environment: Mapping[str, Any]) -> str:
    commit = environment["commit"]
    return str(environment["rwkv_train"]) if commit is None else f"commit {commit}"


def look_up(
    tables: Sequence[CrossoverTable],
    chip: Chip | None,
    case: Case,
    n_recurrences: int | None,
    n_tokens: int | None,
) -> Speeds:
    """Return the measured times that say most about a problem: those at the nearest point. Pure.

    The distance of two sizes is that of the points (log2 recurrences, log2 tokens); of points equally far the one with
    fewer tokens is taken, and of these the one with fewer recurrences. Beyond the grid its edge stands for all.

    Args:
        tables: of the chip; the first one that has the case is taken.
        chip: what the problem runs on, ``None`` if that is not known.
        case: operator, head size, dtype and pass.
        n_recurrences: sequences times heads (without heads: times channels), ``None`` if not known.
        n_tokens: tokens of a sequence, likewise.
    """
    if chip is None:
        return Speeds({}, "no speeds were measured: the chip is not known")
    if not tables:
        return Speeds({}, f"no speeds were measured on {chip.name} ('{TUNE}' does that)")
    having = ((table.path, table.cases[case]) for table in tables if case in table.cases)
    path, measured = next(((path, found) for path, found in having if found.points), (None, None))
    if measured is None:
        heads = "" if case.head_size is None else f"with heads of {case.head_size} "
        return Speeds(
            {}, f"no speeds of {case.op} {heads}in {case.dtype}, {case.kind}, were measured on {chip.name}"
        )
    if n_recurrences is None or n_tokens is None:
        return Speeds({}, "measured speeds were not looked at: sizes are open in this graph")

    def distance(point: Point) -> tuple[float, int, int]:
        away = math.log2(point.n_recurrences / n_recurrences) ** 2 + math.log2(point.n_tokens / n_tokens) ** 2
        return away, point.n_tokens, point.n_recurrences

    nearest = min(measured.points, key=distance)
    width = "B C" if case.head_size is None else "B H"
    return Speeds(
        nearest.milliseconds,
        f"{case.kind} at {width} = {nearest.n_recurrences}, T = {nearest.n_tokens} on {chip.name}; "
        f"{path}, measured with {measured.version}",
        measured.backends,
    )


def warn_of_unmeasured(case: Case, names: Sequence[str]) -> None:
    """Say, once a process for a case, that backends are newer than the times that it is chosen by."""
    if names:
        _warn_once(case, tuple(names))


@functools.cache
def _warn_once(case: Case, names: tuple[str, ...]) -> None:
    heads = "" if case.head_size is None else f", heads of {case.head_size}"
    dtype = _DTYPE_OPTIONS.get(case.dtype)
    logger.warning(
        "%s (%s, %s%s): 'auto' chooses by times that were measured without %s, which is therefore never chosen; "
        "measure again with '%s --op %s%s --overwrite'",
        case.op,
        case.dtype,
        case.kind,
        heads,
        " and ".join(names),
        TUNE,
        case.op,
        "" if dtype is None else f" --dtype {dtype}",
    )


def power_of_two_near(n: int) -> int:
    """Return the power of two that is nearest to ``n`` on a logarithmic scale; 1 for 0.

    Example:
        >>> [power_of_two_near(n) for n in (1, 3, 5, 6, 12, 4096)]
        [1, 4, 4, 8, 16, 4096]
    """
    return 1 << (n * n).bit_length() // 2


def _read_point(point: Any) -> Point:
    sizes = point["recurrences"], point["tokens"]
    if not all(isinstance(size, int) and 0 < size <= _LARGEST_SIZE for size in sizes):
        raise ValueError(f"it is damaged: the sizes of a point are {sizes}")
    milliseconds = dict(point["ms"].items())
    for name, value in milliseconds.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"it is damaged: a time of {name} is {value!r}")
    return Point(*sizes, milliseconds)


def _text(chip: Chip) -> str:
    return str(chip.name) if chip.capability is None else f"{chip.name} (sm_{chip.capability})"
