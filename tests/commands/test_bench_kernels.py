"""``rwkv-train bench kernels`` with its options, in this process."""

import json
import os
import sys

import pytest
import torch

from rwkv_train.benchmarks import machine_limits, stopwatch, tuning
from rwkv_train.ops.chip import chip_name
from rwkv_train.ops.crossover import Case, Chip, read_table

PLUG_IN = """
def echo(r, w, k, v, a, b):
    return v + 0 * (r + w + k + a + b), None
"""
SMALL = ("--size", "B1T9H2N8", "--repeats", "1", "--device", "cpu")


@pytest.fixture
def bench(monkeypatch, tmp_path, call_main):
    """Run the command on a machine of small caches; returns exit code, stdout and stderr."""
    caches = tmp_path / "caches" / "index0"
    caches.mkdir(parents=True)
    (caches / "size").write_text("64K")
    monkeypatch.setattr(stopwatch, "_CPU_CACHES", caches.parent)
    monkeypatch.setitem(machine_limits.COPIED_BYTES, "cpu", 2**16)
    monkeypatch.setitem(machine_limits.MATRIX_WIDTH, "cpu", 64)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plug_in_for_bench.py").write_text(PLUG_IN)

    def run(*arguments):
        code, out, err = call_main("bench", *arguments)
        return code or 0, out, err

    yield run
    sys.modules.pop("plug_in_for_bench", None)


def test_a_plug_in_is_measured_beside_ours_and_its_difference_shows(bench, tmp_path):
    path = tmp_path / "kernels.json"
    arguments = ("--op", "wkv7", "--peer", "plug_in_for_bench:echo", "--dtype", "bf16", "--json", str(path))
    code, out, err = bench("kernels", *SMALL, *arguments)

    assert code == 0, err
    rows = json.loads(path.read_text())["results"]
    assert [row["backend"] for row in rows] == ["torch"] * 2 + ["cpp"] * 2 + ["echo"] * 2
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert all(row["difference"] < 0.01 for row in rows[:4])
    assert all(row["difference"] > 0.1 for row in rows[4:])
    assert "echo" in out


@pytest.fixture
def tune(bench, monkeypatch, tmp_path):
    """Tune for a small grid; the folder of the user's tables is ``tables``."""
    monkeypatch.setitem(tuning.GRIDS, "cpu", tuning.Grid((8,), (2,), (1, 3), 2**20))
    monkeypatch.setattr("rwkv_train.ops.crossover.default_cache_folder", lambda: tmp_path / "tables")

    def run(*arguments):
        return bench("kernels", "--tune", "--repeats", "1", "--device", "cpu", *arguments)

    return run


def test_tuning_writes_the_table_where_auto_finds_it_and_replaces_it_only_when_told(tune, tmp_path):
    chip = Chip(chip_name(torch.device("cpu")), None)
    path = tmp_path / "tables" / "crossover" / chip.file_name
    code, out, err = tune("--op", "wkv7", "--op", "wkv4")
    assert code == 0, err
    assert f"wrote {path}" in out
    assert "wkv7 B1T3H2N8 forward+backward: " in err

    cases = read_table(path, chip).cases
    points = cases[Case("wkv7", 8, "float32", "forward+backward")].points
    assert [(point.n_recurrences, point.n_tokens) for point in points] == [(2, 1), (2, 3)]
    assert all(set(point.milliseconds) == {"cpp", "torch"} for point in points)
    assert {case.op for case in cases} == {"wkv7", "wkv4"}
    for entry in json.loads(path.read_text())["measured"]:
        assert {"device", "torch", "commit", "command", "threads"} <= set(entry["environment"])

    before = path.read_bytes()
    code, out, err = tune("--op", "wkv5")
    assert (code, out) == (2, "")
    assert f"{path} is already there; choose another --output, or replace its times" in err
    assert path.read_bytes() == before
    code, _, err = tune("--op", "wkv5", "--overwrite", "--dtype", "bf16")
    assert code == 0, err
    assert "replaced whole" not in err
    after = read_table(path, chip).cases
    assert {case: after[case] for case in cases} == cases
    assert {(case.op, case.dtype) for case in set(after) - set(cases)} == {("wkv5", "bfloat16")}


def test_what_is_no_table_of_this_chip_is_replaced_whole_when_told(tune, tmp_path):
    chip, path = Chip(chip_name(torch.device("cpu")), None), tmp_path / "table.json"
    path.write_text('{"format": 2, "chip": "another", "capability": null, "measured": []}')
    arguments = ("--op", "wkv4", "--output", str(path))
    code, _, err = tune(*arguments)
    assert code == 2
    assert "is already there" in err
    code, _, err = tune(*arguments, "--overwrite")
    assert code == 0, err
    assert f"{path} will be replaced whole: it was measured on another, not on {chip.name}" in err
    assert {case.op for case in read_table(path, chip).cases} == {"wkv4"}


def test_tuning_that_is_stopped_keeps_the_operators_that_are_done(tune, monkeypatch, tmp_path):
    def stop_at_the_second(op, *arguments, **options):
        if op == "wkv6":
            raise KeyboardInterrupt
        return measure(op, *arguments, **options)

    measure = tuning.tune
    monkeypatch.setattr(tuning, "tune", stop_at_the_second)
    path = tmp_path / "new" / "table.json"
    code, _, _ = tune("--op", "wkv7", "--op", "wkv6", "--output", str(path))
    assert code == 130
    chip = Chip(chip_name(torch.device("cpu")), None)
    first = read_table(path, chip).cases
    assert {case.op for case in first} == {"wkv7"}

    # And what was there before.
    again = ("--op", "wkv7", "--op", "wkv6", "--dtype", "bf16", "--overwrite")
    code, _, _ = tune(*again, "--output", str(path))
    assert code == 130
    after = read_table(path, chip).cases
    assert {case: after[case] for case in first} == first
    assert {(case.op, case.dtype) for case in after} == {("wkv7", "float32"), ("wkv7", "bfloat16")}


@pytest.mark.parametrize("name", ["roofs.png", "roofs.svg"])
def test_a_picture_is_written_into_a_new_folder(bench, tmp_path, name):
    path = tmp_path / "new" / name
    code, out, err = bench("kernels", *SMALL, "--op", "wkv4", "--backend", "cpp", "--plot", str(path))
    assert code == 0, err
    assert path.stat().st_size > 1000
    assert f"wrote {path}" in out


def test_what_failed_is_said_below_the_table_which_stays_narrow(bench):
    arguments = ("--op", "wkv6", "--backend", "cpp", "--peer", "plug_in_for_bench:echo")
    code, out, err = bench("kernels", *SMALL, *arguments)
    assert code == 0, err
    *table, forward, backward = out.splitlines()
    assert forward.startswith("wkv6 B1T9H2N8 echo forward failed: TypeError: ")
    assert forward.endswith("missing 1 required positional argument: 'b'")
    assert backward.startswith("wkv6 B1T9H2N8 echo forward+backward failed: TypeError: ")
    assert max(map(len, table)) <= 120


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["kernels", "--op", "wkv9"], "--op wkv9: there is no such operator"),
        (["kernels", "--size", "8x4096"], "--size 8x4096: wanted B8T4096H32N64"),
        (
            ["kernels", "--peer", "no_such_module:function", "--op", "wkv7"],
            "no_such_module cannot be imported",
        ),
        (["kernels", "--peer", "plug_in_for_bench:echo"], "does not say which operator"),
        (["kernels", "--backend", "fast"], "there is no backend 'fast'"),
        (["kernels", "--backend", "cuda_exact"], "the backend 'cuda_exact' cannot run this problem"),
        (["kernels", "--plot", "roofs.pdf"], "--plot roofs.pdf must end in .png or .svg"),
        (["training", "--plot", "roofs.png"], "--plot is for kernels, not for training"),
        (["training", "--op", "wkv7"], "--op is for kernels, not for training"),
        (["training", "--tune"], "--tune is for kernels, not for training"),
        (["kernels", "--tune", "--size", "B1T9H2N8"], "--size is not for --tune"),
        (["kernels", "--output", "table.json"], "--output is for --tune"),
    ],
    ids=[
        "op",
        "size",
        "peer",
        "peer's op",
        "backend",
        "dtype",
        "picture",
        "plot of training",
        "op of training",
        "tuning of training",
        "size of tuning",
        "output of no tuning",
    ],
)
def test_what_is_not_there_is_refused_in_one_line_before_anything_is_measured(
    bench, monkeypatch, arguments, sentence
):
    monkeypatch.setattr(machine_limits, "measure_limits", lambda *_: pytest.fail("measured"))
    code, out, err = bench(*arguments, "--device", "cpu")
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_size_that_does_not_fit_into_memory_is_named(bench):
    # 820 TB each: more than a process can address.
    code, out, err = bench("kernels", *SMALL, "--op", "wkv6", "--size", "B1000000T100000H32N64")
    assert (code, out) == (2, "")
    assert "wkv6 B1000000T100000H32N64 does not fit into memory; give a smaller --size" in err


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize(
    "place",
    [
        "folder.png",
        "file/new/roofs.png",
        "file/roofs.png",
        "loop.png",
        "/proc/roofs.png",
        "/proc/new/roofs.png",
    ],
)
def test_a_file_that_cannot_be_written_is_refused_in_one_line_before_anything_is_measured(
    bench, monkeypatch, tmp_path, option, place
):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    monkeypatch.setattr(machine_limits, "measure_limits", lambda *_: pytest.fail("measured"))
    code, out, err = bench("kernels", *SMALL, option, str(tmp_path / place))
    assert (code, out) == (2, "")
    assert f"{place} cannot be written" in err
    assert err.count("\n") == 1


def test_a_link_to_a_file_of_results_stays_one(bench, tmp_path):
    link, path = tmp_path / "link.json", tmp_path / "kernels.json"
    link.symlink_to(path)
    path.write_text("old")
    code, _, err = bench("kernels", *SMALL, "--op", "wkv4", "--backend", "cpp", "--json", str(link))
    assert code == 0, err
    assert link.is_symlink()
    assert json.loads(path.read_text())["results"]


def test_results_go_into_a_pipe(bench):
    reader, writer = os.pipe()
    with os.fdopen(reader) as results:
        with os.fdopen(writer, "w"):
            arguments = ("--op", "wkv4", "--backend", "cpp", "--json", f"/dev/fd/{writer}")
            code, _, err = bench("kernels", *SMALL, *arguments)
        assert code == 0, err
        assert json.load(results)["results"]
