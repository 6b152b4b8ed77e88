"""The table that "auto" chooses by: what is measured, what is left out, and that the choice reads what is written."""

import json

import pytest
import torch

from rwkv_train.benchmarks import kernels
from rwkv_train.benchmarks.kernel_sizes import KernelSize
from rwkv_train.benchmarks.kernels import default_backends
from rwkv_train.benchmarks.stopwatch import cold_stopwatch
from rwkv_train.benchmarks.tuning import (
    GRIDS,
    Grid,
    Tuned,
    add_measured,
    count_fastest,
    table_text,
    tune,
    tuning_sizes,
)
from rwkv_train.errors import BackendError
from rwkv_train.ops.backends import choose_backend
from rwkv_train.ops.crossover import FORWARD, FORWARD_BACKWARD, Case, Chip, look_up, read_measured, read_table
from rwkv_train.ops.prepare import OPERATORS

CPU = torch.device("cpu")
SMALL = Grid(head_sizes=(64,), n_heads=(1, 64), n_tokens=(1, 3), most_numbers=64 * 64 * 2)
"""B H = 1 with both numbers of tokens, and 64 with one token: with three it has too many numbers."""


@pytest.fixture
def seconds(monkeypatch):
    """A stopwatch that finds "torch" to be faster than "cpp" for one token, and slower for more."""
    running = []
    contender_of = kernels.backend_contender

    def spied(op, backend, inputs):
        contender = contender_of(op, backend, inputs)

        def run():
            running[:] = [backend, inputs.tensors[3].shape[1]]
            return contender.run()

        return contender._replace(run=run)

    def stopwatch(call):
        call()
        backend, n_tokens = running
        return {("torch", 1): 1e-3, ("cpp", 1): 2e-3}.get(
            (backend, n_tokens), 4e-3 if backend == "torch" else 3e-3
        )

    monkeypatch.setattr(kernels, "backend_contender", spied)
    return stopwatch


def tuned(op, stopwatch, grid=SMALL):
    said = []
    found = tune(op, grid, 1, device=CPU, dtype=torch.float32, stopwatch=stopwatch, report=said.append)
    return found, said


@pytest.mark.parametrize("op", ["wkv7", "wkv4"])
def test_what_was_the_faster_one_is_what_auto_chooses(seconds, tmp_path, op):
    found, said = tuned(op, seconds)
    chip = Chip("a chip", None)
    path = tmp_path / chip.file_name
    environment = {"rwkv_train": "0.1.0", "commit": "abc", "command": "rwkv-train bench kernels --tune"}
    path.write_text(table_text(chip, add_measured([], found, environment, 1)))
    table = read_table(path, chip)

    head_size, width = (None, 64) if op == "wkv4" else (64, 1)
    for kind in (FORWARD, FORWARD_BACKWARD):
        points, backends, version = table.cases[Case(op, head_size, "float32", kind)]
        assert (backends, version) == ({"torch", "cpp"}, "commit abc")
        sizes = [(width, 1), (width, 3), (64 * width, 1)]
        assert [(point.n_recurrences, point.n_tokens) for point in points] == sizes
        for n_tokens, expected in ((1, "torch"), (4, "cpp")):
            case = Case(op, head_size, "float32", kind)
            speeds = look_up([table], chip, case, width, n_tokens)
            problem = kernels.problem_of_size(KernelSize(op, 1, n_tokens, 1, 64), CPU, torch.float32)
            assert choose_backend(OPERATORS[op], problem, "auto", speeds=speeds).name == expected
    (entry,) = json.loads(path.read_text())["measured"]
    assert (entry["environment"], entry["repeats"]) == (environment, 1)
    assert [count_fastest(case) for case in found.cases] == [{"torch": 2, "cpp": 1}] * 2
    assert found.left_out == []
    assert len(said) == 6


def test_a_new_measurement_replaces_its_operator_and_dtype_and_leaves_the_others_and_their_commits(tmp_path):
    chip, path = Chip("a chip", None), tmp_path / "table.json"

    def add(op, dtype, milliseconds, commit, left_out=()):
        point = {"recurrences": 8, "tokens": 1, "ms": {"torch": milliseconds}}
        cases = [{"head_size": 64, "pass": FORWARD, "backends": ["torch"], "points": [point]}]
        before = read_measured(path, chip) if path.exists() else []
        environment = {"rwkv_train": "0.1.0", "commit": commit}
        after = add_measured(before, Tuned(op, dtype, cases, list(left_out)), environment, repeats=5)
        path.write_text(table_text(chip, after))

    add("wkv7", "float32", 1.0, "one")
    add("wkv7", "bfloat16", 2.0, "two", ["wkv7 cuda: no compiler"])
    add("wkv6", "float32", 3.0, None)
    add("wkv7", "float32", 4.0, "four")

    table = read_table(path, chip)
    found = {
        (case.op, case.dtype): (measured.points[0].milliseconds["torch"], measured.version)
        for case, measured in table.cases.items()
    }
    assert found == {
        ("wkv7", "float32"): (4.0, "commit four"),
        ("wkv7", "bfloat16"): (2.0, "commit two"),
        ("wkv6", "float32"): (3.0, "0.1.0"),
    }
    assert [entry["left_out"] for entry in read_measured(path, chip)] == [[], ["wkv7 cuda: no compiler"], []]
    case = Case("wkv7", 64, "bfloat16", FORWARD)
    assert look_up([table], chip, case, 8, 1).said.endswith(f"; {path}, measured with commit two")


def test_the_loop_and_what_auto_never_takes_are_not_measured(seconds, monkeypatch):
    monkeypatch.setitem(OPERATORS["wkv7"], "cpp", OPERATORS["wkv7"]["cpp"]._replace(in_auto=False))
    found, _ = tuned("wkv7", seconds, SMALL._replace(n_heads=(1,), n_tokens=(1,)))
    assert {name for case in found.cases for point in case["points"] for name in point["ms"]} == {"torch"}
    assert [case["backends"] for case in found.cases] == [["torch"], ["torch"]]


def test_what_cannot_be_loaded_is_left_out_once(seconds, monkeypatch):
    def cannot_load():
        raise BackendError("no compiler")

    monkeypatch.setitem(OPERATORS["wkv7"], "cpp", OPERATORS["wkv7"]["cpp"]._replace(load=cannot_load))
    found, said = tuned("wkv7", seconds)
    assert found.left_out == ["wkv7 cpp: no compiler"]
    assert said[0] == "wkv7 cpp: no compiler"
    assert all(list(point["ms"]) == ["torch"] for case in found.cases for point in case["points"])
    assert [case["backends"] for case in found.cases] == [["torch"], ["torch"]]


def test_a_fast_wrong_kernel_is_left_out(seconds, monkeypatch):
    row = OPERATORS["wkv7"]["cpp"]

    def wrong(*arguments):
        y, state = row.run(*arguments)
        return 1.25 * y, state

    monkeypatch.setitem(OPERATORS["wkv7"], "cpp", row._replace(run=wrong))
    found, _ = tuned("wkv7", seconds, SMALL._replace(n_heads=(1,), n_tokens=(3,)))
    assert [list(point["ms"]) for case in found.cases for point in case["points"]] == [["torch"], ["torch"]]
    assert [set(case["backends"]) for case in found.cases] == [{"torch", "cpp"}] * 2
    assert found.left_out == [
        f"wkv7 B1T3H1N64 cpp {kind}: its result differs by 0.25 from that of torch"
        for kind in ("forward", "forward+backward")
    ]


def test_what_cannot_be_compared_is_left_out(seconds, monkeypatch):
    def too_large(*arguments):
        raise MemoryError

    table = OPERATORS["wkv7"]
    monkeypatch.setitem(table, "torch", table["torch"]._replace(run=too_large))
    found, _ = tuned("wkv7", seconds, SMALL._replace(n_heads=(1,), n_tokens=(3,)))
    assert [case["points"] for case in found.cases] == [[], []]
    assert "torch, which its result is held to, did not run" in found.left_out[-1]


def test_a_size_that_does_not_fit_into_memory_is_left_out(seconds):
    # 820 TB: more than a process can address.
    grid = Grid(head_sizes=(64,), n_heads=(2**15,), n_tokens=(10**8,), most_numbers=2**60)
    found, _ = tuned("wkv6", seconds, grid)
    assert found.left_out == ["wkv6 B1024T100000000H32N64 does not fit into memory"]
    assert [case["points"] for case in found.cases] == [[], []]


def test_more_heads_than_a_model_has_stand_in_several_rows():
    grid = Grid((64,), (8, 32, 512), (16,), 2**28)
    assert tuning_sizes("wkv7", grid) == {
        64: [
            KernelSize("wkv7", 1, 16, 8, 64),
            KernelSize("wkv7", 1, 16, 32, 64),
            KernelSize("wkv7", 16, 16, 32, 64),
        ]
    }
    assert tuning_sizes("wkv4", grid)[None][2] == KernelSize("wkv4", 16, 16, 1, 2048)


def test_the_grid_of_a_gpu_holds_the_sizes_that_the_goals_are_stated_for():
    grid = GRIDS["cuda"]
    for head_size, sizes in tuning_sizes("wkv7", grid).items():
        measured = {(size.B * size.H, size.T) for size in sizes}
        assert {(256, 4096), (16, 32768), (32, 1)} <= measured
        assert max(size.B * size.T * size.H for size in sizes) * head_size == grid.most_numbers
    assert set(tuning_sizes("wkv7", grid)) == {64, 128}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_backend_that_auto_may_choose_has_a_time_at_every_size():
    device = torch.device("cuda")
    grid, dtype = Grid((64,), (8, 64), (1, 100), 2**20), torch.bfloat16
    watch = cold_stopwatch(device)
    found = tune("wkv7", grid, 2, device=device, dtype=dtype, stopwatch=watch, report=lambda line: None)
    known = default_backends(KernelSize("wkv7", 1, 1, 8, 64), device, dtype)
    names = {name for name in known if OPERATORS["wkv7"][name].in_auto}
    assert found.left_out == []
    assert [len(case["points"]) for case in found.cases] == [4, 4]
    for case in found.cases:
        for point in case["points"]:
            assert set(point["ms"]) == names
            assert min(point["ms"].values()) > 0
