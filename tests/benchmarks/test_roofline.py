"""The picture of the roofs: what is drawn where."""

import pytest

from rwkv_train.benchmarks.kernel_sizes import KernelSize
from rwkv_train.benchmarks.machine_limits import MachineLimits
from rwkv_train.benchmarks.roofline import draw_roofline, group_points, spread
from rwkv_train.errors import ConfigError

LIMITS = MachineLimits(copy_bytes_per_second=1e10, matmul_operations_per_second=1e11)


def row(op, *size, backend="torch", kind="forward", ms=2.0, packed=False):
    return {
        **KernelSize(op, *size, packed)._asdict(),
        "backend": backend,
        "pass": kind,
        "ms": ms,
        "bytes": 1000,
        "operations": 4000,
        "of_copy": 0.25,
        "of_matmul": 0.5,
    }


def test_a_point_stands_at_operations_per_byte_and_per_second():
    ((panel, (point,)),) = group_points([row("wkv7", 4, 512, 12, 64)]).items()
    assert panel == ("B4T512H12N64", "forward")
    assert (point.intensity, point.rate) == (4, 2e6)
    assert point.label == "wkv7 torch  50.0%"


def test_there_is_a_panel_for_each_size_and_pass_and_wkv4_joins_its_width():
    rows = [
        row("wkv7", 4, 512, 12, 64),
        row("wkv7", 4, 512, 12, 64, kind="forward+backward"),
        row("wkv7", 4, 512, 12, 64, packed=True),
        row("wkv4", 4, 512, 1, 768),
        row("wkv4", 4, 512, 1, 100),
    ]
    panels = {panel: [point.op for point in points] for panel, points in group_points(rows).items()}
    assert panels == {
        ("B4T512H12N64", "forward"): ["wkv7", "wkv4"],
        ("B4T512H12N64", "forward+backward"): ["wkv7"],
        ("B4T512H12N64-packed", "forward"): ["wkv7"],
        ("B4T512C100", "forward"): ["wkv4"],
    }


def test_labels_stand_apart_and_stay_near_their_points():
    assert spread([0.9, 0.5, 0.1], 0.1) == [0.9, 0.5, 0.1]
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.5, 0.4, 0.3])
    assert spread([0.1, 0.05, 0.0], 0.1) == pytest.approx([0.2, 0.1, 0.0])
    assert spread([1.0, 1.0, 1.0], 0.5) == pytest.approx([1.0, 0.5, 0.0])
    assert spread([], 1.0) == []


@pytest.mark.parametrize(("picture_format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_is_drawn(picture_format, start):
    rows = [row("wkv7", 4, 512, 12, 64, backend="$a_peer$"), row("wkv4", 1, 1, 1, 1, ms=None)]
    assert draw_roofline(rows, LIMITS, "a $machine$", picture_format).startswith(start)


def test_every_row_with_a_time_is_labelled():
    rows = [
        row(op, 4, 512, 12, 64, backend=f"backend{number}", kind=kind, ms=1 + number)
        for op in ("wkv7", "wkv6", "wkv5")
        for number in range(7)
        for kind in ("forward", "forward+backward")
    ]
    picture = draw_roofline(rows, LIMITS, "machine", "svg").decode()
    assert all(f"<!-- {one['op']} {one['backend']}  50.0% -->" in picture for one in rows)


def test_where_nothing_was_measured_there_is_no_picture():
    with pytest.raises(ConfigError, match="nothing could be measured"):
        draw_roofline([row("wkv7", 4, 512, 12, 64, ms=None)], LIMITS, "machine", "png")
