"""The doctor on this machine, and on one where torch is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_train.commands.doctor import join_rows
from rwkv_train.planning.doctor.backends import BackendRow

CHECKOUT = Path(__file__).parents[2]


def doctor(*arguments, columns=100, **environment):
    return subprocess.run(
        [sys.executable, str(CHECKOUT / "cli.py"), "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "COLUMNS": str(columns), **environment},
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What the doctor prints and writes about this machine."""
    path = tmp_path_factory.mktemp("doctor") / "report.json"
    result = doctor("--json", path)
    return result, json.loads(path.read_text())


@pytest.fixture
def broken(tmp_path):
    """A folder for PYTHONPATH in which torch cannot be imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    )
    return tmp_path


def test_where_the_tests_run_training_can_run_too(here):
    result, report = here
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Training can run here" in result.stdout
    assert (report["can_train"], report["obstacles"]) == (True, [])


def test_versions_are_those_that_pip_lists(here):
    _, report = here
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
        capture_output=True,
        check=True,
    )
    versions = {one["name"].lower().replace("_", "-"): one["version"] for one in json.loads(listed.stdout)}
    found = {
        name: one["facts"].get("version")
        for name, one in report["findings"].items()
        if one["status"] != "absent" and name.replace("_", "-") in versions
    }
    assert {"torch", "lightning", "wandb", "datasets"} <= set(found)
    del found["rwkv_train"], found["ninja"]  # the checkout's own version; the program's, not the package's
    assert found == {name: versions[name.replace("_", "-")] for name in found}


def test_every_backend_of_every_operator_is_in_the_report(here):
    from rwkv_train.ops.prepare import OPERATORS

    _, report = here
    on_cpu = {
        (row["op"], row["backend"], row["dtype"]): row["status"]
        for row in report["backends"]
        if row["device"] == "cpu"
    }
    assert set(on_cpu) == {
        (op, backend, dtype)
        for op, table in OPERATORS.items()
        for backend in table
        for dtype in ("float32", "bfloat16")
    }
    assert {status for (_, backend, _), status in on_cpu.items() if backend == "torch"} == {"available"}
    assert {status for (_, backend, _), status in on_cpu.items() if backend.startswith("cuda")} == {"refuses"}


def test_a_torch_that_is_broken_is_reported_with_the_remedy_and_exit_code_2(broken):
    path = broken / "report.json"
    result = doctor("--json", path, PYTHONPATH=str(broken))
    assert result.returncode == 2
    assert "Training cannot run here" in result.stdout
    assert "libcudart.so.13" in result.stdout
    assert "pip install --force-reinstall 'torch" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: training cannot run here")
    report = json.loads(path.read_text())
    assert not report["can_train"]
    assert report["findings"]["torch"]["status"] == "error"
    assert report["backends"] == []


@pytest.mark.parametrize("columns", [80, 140])
def test_a_report_is_as_wide_as_the_terminal(broken, columns):
    result = doctor(columns=columns, PYTHONPATH=str(broken))
    assert max(map(len, result.stdout.splitlines())) <= columns


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    result = doctor("--json", tmp_path / "no folder" / "report.json")
    assert result.returncode == 2
    assert "--json" in result.stderr
    assert result.stdout == ""


def row(device, op, backend, dtype, status="available", reason=None, remedy=None):
    return BackendRow(device, op, backend, dtype, status, False, reason, remedy)


def test_what_devices_operators_and_dtypes_share_is_said_once():
    rows = [
        row(device, op, "torch", dtype)
        for device in ("cuda:0", "cuda:1")
        for op in ("wkv6", "wkv7")
        for dtype in ("float32", "bfloat16")
    ]
    assert join_rows(rows) == [["cuda:0, cuda:1", "torch", "all", "available"]]


def test_what_differs_stays_apart_and_a_backend_s_rows_together():
    rows = [
        row("cpu", "wkv6", "cpp", "float32"),
        row("cpu", "wkv6", "cpp", "bfloat16", "fails", "it fails", "repair it"),
        row("cpu", "wkv6", "torch", "float32"),
        row("cpu", "wkv6", "torch", "bfloat16"),
        row("cpu", "wkv7", "cpp", "float32"),
        row("cpu", "wkv7", "cpp", "bfloat16"),
        row("cpu", "wkv7", "torch", "float32"),
        row("cpu", "wkv7", "torch", "bfloat16"),
    ]
    assert join_rows(rows) == [
        ["cpu", "cpp", "wkv6 in float32", "available"],
        ["cpu", "cpp", "wkv6 in bfloat16", "no: it fails\n-> repair it"],
        ["cpu", "cpp", "wkv7", "available"],
        ["cpu", "torch", "all", "available"],
    ]
