"""Measured recurrences under the roofs of the machine, as a picture."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

# Not pyplot: it would keep every figure, and choose a window system.
from matplotlib.figure import Figure

from rwkv_train.benchmarks.kernel_counts import PASSES
from rwkv_train.benchmarks.kernel_sizes import NO_HEADS, KernelSize
from rwkv_train.benchmarks.machine_limits import MachineLimits
from rwkv_train.errors import ConfigError

FORMATS = ("png", "svg")
MARKERS = {"wkv4": "o", "wkv5": "s", "wkv6": "^", "wkv7": "D"}
PANEL_WIDTH, PANEL_HEIGHT, AROUND_A_PANEL, LABEL_HEIGHT = 7.5, 3.2, 0.8, 0.17
"""In inches: a panel with its titles (a higher one where there are many labels), these alone, a line of labels."""


class Point(NamedTuple):
    """One measured row."""

    label: str
    op: str
    backend: str
    intensity: float
    """Operations per byte."""
    rate: float
    """Operations per second."""


class View(NamedTuple):
    """What all panels show alike."""

    x: tuple[float, float]
    y: tuple[float, float]
    limits: MachineLimits
    colours: Mapping[str, str]


def draw_roofline(
    rows: Sequence[Mapping[str, Any]], limits: MachineLimits, title: str, picture_format: str
) -> bytes:
    """Draw the achieved rate over operations per byte: a panel for each size and pass, a point for each row.

    Both counts are those of :mod:`rwkv_train.benchmarks.kernel_counts`, so all that compute one operator stand
    above each other, and the way up to the roof is what could be gained. The labels stand beside the panel, in the
    order of the points.

    Args:
        rows: of :func:`rwkv_train.benchmarks.kernels.bench_kernels`; those without a time are left out.
        limits: the roofs, in the dtype of the rows.
        title: what was measured where.
        picture_format: one of ``FORMATS``.

    Raises:
        ConfigError: no row has a time.
    """
    panels = group_points(rows)
    points = [point for panel in panels.values() for point in panel]
    if not points:
        raise ConfigError("nothing could be measured, so there is no picture to draw")
    ridge = limits.matmul_operations_per_second / limits.copy_bytes_per_second
    intensities = [ridge, *(point.intensity for point in points)]
    rates = [limits.matmul_operations_per_second, *(point.rate for point in points)]
    view = View(
        x=(min(intensities) / 2, max(intensities) * 2),
        y=(min(rates) / 2, max(rates) * 3),
        limits=limits,
        colours=_colours(points),
    )
    shapes = list(dict.fromkeys(shape for shape, _ in panels))
    heights = [
        max(
            PANEL_HEIGHT,
            AROUND_A_PANEL + LABEL_HEIGHT * max(len(panels.get((shape, kind), ())) for kind in PASSES),
        )
        for shape in shapes
    ]
    figure = Figure(figsize=(PANEL_WIDTH * len(PASSES), sum(heights) + 0.8), layout="constrained")
    figure.suptitle(f"{title}; percentages are of the roof", parse_math=False)
    axes = figure.subplots(len(shapes), len(PASSES), squeeze=False, height_ratios=heights)
    for line, shape in zip(axes, shapes, strict=True):
        for axis, kind in zip(line, PASSES, strict=True):
            axis.set_title(f"{shape}, {kind}", fontsize="medium")
            _draw_panel(axis, panels.get((shape, kind), []), view)
    for axis in axes[-1]:
        axis.set_xlabel("operations per byte that must be moved")
    for line in axes:
        line[0].set_ylabel("operations per second")
    buffer = BytesIO()
    figure.savefig(buffer, format=picture_format, dpi=120)
    return buffer.getvalue()


def group_points(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Point]]:
    """Return the points of each panel, by size and pass; wkv4 joins the first size of its width."""
    with_heads: dict[tuple[Any, ...], str] = {}
    for row in rows:
        if row["op"] != NO_HEADS:
            with_heads.setdefault(_width_of(row), _size_of(row).label)
    panels: dict[tuple[str, str], list[Point]] = {}
    for row in rows:
        if row["ms"] is None:
            continue
        label = _size_of(row).label
        shape = with_heads.get(_width_of(row), label) if row["op"] == NO_HEADS else label
        rate = row["operations"] / (row["ms"] * 1e-3)
        part = f"  {max(row['of_copy'], row['of_matmul']):.1%}" if row["of_copy"] is not None else ""
        point = Point(
            f"{row['op']} {row['backend']}{part}",
            row["op"],
            row["backend"],
            row["operations"] / row["bytes"],
            rate,
        )
        panels.setdefault((shape, row["pass"]), []).append(point)
    return panels


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart, as little as need be, so that they stand ``gap`` apart within 0 to 1 in the same order.

    Args:
        heights: falling, each from 0 to 1.
        gap: at most 1 / (number of heights - 1).
    """
    moved: list[float] = []
    for number, height in enumerate(heights):
        lowest_free = (len(heights) - 1 - number) * gap  # leaves room for those that follow
        highest_free = moved[-1] - gap if moved else 1.0
        moved.append(min(highest_free, max(height, lowest_free)))
    return moved


def _colours(points: Sequence[Point]) -> dict[str, str]:
    names = dict.fromkeys(point.backend for point in points)
    return {name: f"C{number % 10}" for number, name in enumerate(names)}


def _size_of(row: Mapping[str, Any]) -> KernelSize:
    return KernelSize(*(row[field] for field in KernelSize._fields))


def _width_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["B"], row["T"], row["H"] * row["N"], row["packed"]


def _draw_panel(axis: Any, points: Sequence[Point], view: View) -> None:
    copy, matmul = view.limits
    ridge = matmul / copy
    axis.set_xscale("log", base=2)
    axis.set(yscale="log", xlim=view.x, ylim=view.y)
    axis.xaxis.set_major_formatter("{x:g}")
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_formatter("")
    axis.grid(alpha=0.25, which="major")
    axis.plot([view.x[0], ridge, view.x[1]], [copy * view.x[0], matmul, matmul], color="black", linewidth=1.2)
    names = f"copy {copy * 1e-9:,.0f} GB/s, matrix product {matmul * 1e-9:,.0f} Gop/s"
    axis.annotate(names, (0.02, 0.97), xycoords="axes fraction", va="top", fontsize="small")

    ordered = sorted(points, key=lambda point: -point.rate)
    gap = min(LABEL_HEIGHT / (PANEL_HEIGHT - AROUND_A_PANEL), 1 / max(len(points), 1))
    to_axes = axis.transScale + axis.transLimits
    heights = [float(to_axes.transform((point.intensity, point.rate))[1]) for point in ordered]
    for point, height in zip(ordered, spread(heights, gap), strict=True):
        colour = view.colours[point.backend]
        axis.plot(point.intensity, point.rate, MARKERS.get(point.op, "o"), color=colour, markersize=5)
        axis.annotate(
            point.label,
            (point.intensity, point.rate),
            xytext=(1.02, height),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            color=colour,
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "alpha": 0.6,
                "relpos": (0, 0.5),
            },
        )
