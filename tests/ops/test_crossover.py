"""The choice by measured speeds: which point of which table counts, what is said of it, and what a graph may see."""

import json
import logging
from pathlib import Path

import pytest
import torch

from rwkv_train.errors import BackendError
from rwkv_train.ops import backends as backends_module
from rwkv_train.ops.backends import (
    Backend,
    Problem,
    choose_backend,
    newer_backends,
    prepare,
    problem_of,
    register_operator,
    resolve_backend,
)
from rwkv_train.ops.chip import chip_name
from rwkv_train.ops.context import PLAIN
from rwkv_train.ops.crossover import (
    FORWARD,
    FORWARD_BACKWARD,
    Case,
    Chip,
    CrossoverTable,
    MeasuredCase,
    Point,
    Speeds,
    find_tables,
    look_up,
    power_of_two_near,
    read_table,
)
from rwkv_train.ops.wkv7 import wkv7

H200 = Chip("NVIDIA H200", 90)
ON_H200 = Problem("cuda", torch.bfloat16, 64, capability=90, chip="NVIDIA H200", needs_backward=True)
TRAINING = Case("wkv7", 64, "bfloat16", FORWARD_BACKWARD)
QUICK, SLOW = 1.83, 9.1


def row(refuses=None, load=lambda: None, in_auto=True):
    return Backend(refuses=lambda problem: refuses, load=load, run=lambda *x: x, in_auto=in_auto)


def speeds(**milliseconds):
    return Speeds(milliseconds, "at such a size")


def table_of(**points):
    """A table with one case, whose points are named b8t128."""
    sizes = {name: name[1:].split("t") for name in points}
    found = [Point(*map(int, sizes[name]), times) for name, times in points.items()]
    return CrossoverTable(Path("a file"), {TRAINING: MeasuredCase(found, {"cuda", "torch"}, "commit abc")})


def content(chip=H200, **changes):
    """What a file of a table holds."""
    point = {"recurrences": 256, "tokens": 4096, "ms": {"first": SLOW, "second": QUICK}}
    case = {"head_size": 64, "pass": FORWARD_BACKWARD, "backends": ["first", "second"], "points": [point]}
    environment = {"rwkv_train": "0.1.0", "commit": "0123456789ab"}
    entry = {"op": "wkv7", "dtype": "bfloat16", "environment": environment, "cases": [case]}
    whole = {"format": 2, "chip": chip.name, "capability": chip.capability}
    return whole | {"measured": [entry]} | changes


def content_of(chip=H200, **changes):
    """The same with another entry."""
    return content(chip, measured=[content()["measured"][0] | changes])


def write(folder, table, chip=H200):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / chip.file_name
    path.write_text(json.dumps(table))
    return path


def test_the_fastest_measured_backend_is_taken_and_the_times_are_said():
    choice = choose_backend(
        {"first": row(), "second": row(), "third": row()},
        ON_H200,
        "auto",
        speeds=speeds(first=SLOW, second=QUICK, third=210.0),
    )
    assert choice == (
        "second",
        "'second' is the fastest by measurement (second 1.83 ms, first 9.1 ms, third 210 ms; at such a size)",
    )


def test_among_the_measured_only_those_that_run_are_chosen_from():
    table = {"first": row("it needs luck"), "second": row(), "third": row()}
    choice = choose_backend(
        table, ON_H200, "auto", {"second": "no compiler"}, speeds(first=1.0, second=2.0, third=3.0)
    )
    assert choice.name == "third"
    assert choice.reason.endswith(
        "(third 3 ms; at such a size; not first: it needs luck; not second: no compiler)"
    )


def test_what_was_not_measured_is_not_taken_for_faster_or_slower_but_named():
    choice = choose_backend({"new": row(), "old": row()}, ON_H200, "auto", speeds=speeds(old=SLOW))
    assert choice.name == "old"
    assert choice.reason.endswith("(old 9.1 ms; at such a size; new was not measured there)")


@pytest.mark.parametrize("measured", [{}, {"refusing": 1.0}], ids=["nothing", "only what refuses"])
def test_where_nothing_that_runs_was_measured_the_order_decides(measured):
    table = {"refusing": row("it needs luck"), "first": row(), "second": row()}
    choice = choose_backend(table, ON_H200, "auto", speeds=Speeds(measured, "no speeds were measured on it"))
    assert choice == (
        "first",
        "'first' is the first in the usual order that can run here (not refusing: it needs luck); "
        "no speeds were measured on it",
    )


def test_auto_never_takes_what_is_for_those_who_ask_by_name():
    table = {"rough": row(in_auto=False), "exact": row()}
    assert choose_backend(table, ON_H200, "auto", speeds=speeds(rough=1.0, exact=2.0)).name == "exact"
    assert choose_backend(table, ON_H200, "auto").name == "exact"
    assert choose_backend(table, ON_H200, "rough").name == "rough"
    with pytest.raises(BackendError, match=r"no backend can run this problem \(not exact: no compiler\)"):
        choose_backend(table, ON_H200, "auto", {"exact": "no compiler"})


def test_where_the_fastest_cannot_be_loaded_the_next_by_measurement_is_taken():
    def cannot_load():
        raise BackendError("no compiler")

    table = {"slow": row(), "quick": row(load=cannot_load), "middle": row()}
    choice = resolve_backend(table, ON_H200, "auto", speeds(slow=3.0, quick=1.0, middle=2.0))
    assert choice.name == "middle"
    assert "not quick: no compiler" in choice.reason


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 128), "b8t128"),
        ((16, 256), "b8t128"),  # (1, 1) from the first, (3, 3) from the last
        ((64, 1024), "b128t2048"),
        ((8, 1024), "b8t2048"),
        ((1, 1), "b8t128"),
        ((65536, 1), "b128t128"),
        ((4096, 1048576), "b128t2048"),
        ((8, 512), "b8t128"),  # as far from 128 as from 2,048
        ((32, 128), "b8t128"),
    ],
    ids=str,
)
def test_the_nearest_point_on_the_logarithmic_grid_counts(sizes, expected):
    names = ("b128t2048", "b128t128", "b8t2048", "b8t128")
    table = table_of(**{name: {name: 1.0} for name in names})
    assert list(look_up([table], H200, TRAINING, *sizes).milliseconds) == [expected]


def test_where_the_speeds_come_from_is_said():
    found = look_up([table_of(b256t4096={"cuda": QUICK})], H200, TRAINING, 384, 4096)
    assert found.said == (
        "forward+backward at B H = 256, T = 4096 on NVIDIA H200; a file, measured with commit abc"
    )
    assert found.backends == {"cuda", "torch"}


@pytest.mark.parametrize(
    ("tables", "chip", "case", "sizes", "said"),
    [
        ([], None, TRAINING, (8, 8), "no speeds were measured: the chip is not known"),
        (
            [],
            H200,
            TRAINING,
            (8, 8),
            "no speeds were measured on NVIDIA H200 ('rwkv-train bench kernels --tune'",
        ),
        (
            [table_of(b8t8={"cuda": 1.0})],
            H200,
            TRAINING._replace(head_size=96, kind=FORWARD),
            (8, 8),
            "no speeds of wkv7 with heads of 96 in bfloat16, forward, were measured on NVIDIA H200",
        ),
        ([table_of(b8t8={"cuda": 1.0})], H200, TRAINING, (None, 8), "sizes are open in this graph"),
    ],
    ids=["chip", "table", "case", "sizes"],
)
def test_it_is_said_why_nothing_is_known(tables, chip, case, sizes, said):
    found = look_up(tables, chip, case, *sizes)
    assert found.milliseconds == {}
    assert said in found.said


def test_a_users_table_counts_more_case_by_case(tmp_path):
    user, committed = tmp_path / "user", tmp_path / "committed"
    write(user, content())
    other = content_of(op="wkv6")
    write(committed, content(measured=[*content()["measured"], *other["measured"]]))
    tables = find_tables(H200, (user, committed))

    found = look_up(tables, H200, TRAINING, 256, 4096)
    assert found.milliseconds == {"first": SLOW, "second": QUICK}
    assert f"{user / 'nvidia-h200-sm90.json'}, measured with commit 0123456789ab" in found.said
    assert str(committed) in look_up(tables, H200, TRAINING._replace(op="wkv6"), 256, 4096).said


def test_a_file_is_named_after_its_chip():
    assert H200.file_name == "nvidia-h200-sm90.json"
    assert Chip("AMD EPYC 9654 96-Core Processor", None).file_name == "amd-epyc-9654-96-core-processor.json"


POINT = {"recurrences": 1, "tokens": 1, "ms": {"cuda": 1.0}}


def with_point(**changes):
    case = content()["measured"][0]["cases"][0]
    return content_of(cases=[case | {"points": [POINT | changes]}])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is no table of speeds, or damaged (Expecting property name"),
        ("[]", "it is no table of speeds, or damaged (list indices"),
        ("{}", "it is no table of speeds, or damaged: it has no 'format'"),
        (json.dumps(content(format=1)), "its format is 1, and this rwkv-train reads 2"),
        (
            json.dumps(content(Chip("NVIDIA A100", 80))),
            "it was measured on NVIDIA A100 (sm_80), not on NVIDIA H200",
        ),
        (json.dumps(content_of(cases=[{"points": [], "backends": []}])), "it has no 'head_size'"),
        (json.dumps(content_of(cases=None)), "it is no table of speeds, or damaged ("),
        (json.dumps(content_of(op=["wkv7"])), "an entry is of ['wkv7'] in 'bfloat16'"),
        ("[" * 100_000, "it is no table of speeds, or damaged (maximum recursion"),
        (json.dumps(with_point(tokens=0)), "the sizes of a point are (1, 0)"),
        (json.dumps(with_point(tokens=1 << 63)), "the sizes of a point are (1, 9223372036854775808)"),
        (json.dumps(with_point(ms="1")), "it is no table of speeds, or damaged ("),
        (json.dumps(with_point(ms={"cuda": -1})), "a time of cuda is -1"),
        (json.dumps(with_point(ms={"cuda": float("nan")})), "a time of cuda is nan"),
        (json.dumps(with_point(ms={"cuda": "1"})), "a time of cuda is '1'"),
    ],
    ids=[
        "cut",
        "list",
        "empty",
        "format",
        "chip",
        "case",
        "cases",
        "operator",
        "deep",
        "size",
        "large",
        "times",
        "negative",
        "nan",
        "text",
    ],
)
def test_what_is_no_table_of_this_chip_is_passed_over_in_one_line(tmp_path, caplog, text, said):
    user, committed = tmp_path / "user", tmp_path / "committed"
    path = write(user, {})
    path.write_text(text)
    write(committed, content())
    tables = find_tables(H200, (user, committed))
    assert [table.path for table in tables] == [committed / H200.file_name]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert message.startswith(f"the table of speeds {path} is passed over: ")
    assert said in message
    assert message.endswith("measure again with 'rwkv-train bench kernels --tune --overwrite'")
    assert "\n" not in message


def test_in_a_folder_that_cannot_be_there_are_no_tables(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert find_tables(H200, (tmp_path / "file" / "crossover",)) == ()
    assert caplog.records == []


def test_the_committed_tables_are_whole():
    from rwkv_train.ops.crossover import COMMITTED_FOLDER

    assert (COMMITTED_FOLDER / "README.md").is_file()
    for path in COMMITTED_FOLDER.glob("*.json"):
        found = json.loads(path.read_bytes())
        chip = Chip(found["chip"], found["capability"])
        assert path.name == chip.file_name
        assert read_table(path, chip).cases


def test_a_power_of_two_is_nearest_on_a_logarithmic_scale():
    # 11 and 12 stand on the two sides of 8 sqrt(2) = 11.3.
    assert [power_of_two_near(n) for n in (0, 1, 2, 3, 5, 11, 12, 16, 4096)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        16,
        16,
        4096,
    ]


@pytest.mark.parametrize(
    ("shape", "n_sequences", "expected"),
    [
        ((2, 100, 3, 8), None, (8, 128)),
        ((2, 100, 64), None, (128, 128)),
        ((1, 100, 3, 8), 6, (16, 16)),
    ],
    ids=["heads", "no heads", "packed"],
)
def test_a_problem_knows_its_sizes_its_chip_and_whether_a_backward_follows(shape, n_sequences, expected):
    v = torch.zeros(shape, requires_grad=True)
    problem = problem_of(v, 8, is_packed=n_sequences is not None, n_sequences=n_sequences)
    assert (problem.n_recurrences, problem.n_tokens) == expected
    assert problem.chip == chip_name(torch.device("cpu"))
    assert problem.needs_backward
    with torch.no_grad():
        assert not problem_of(v, 8, is_packed=False).needs_backward
    assert not problem_of(v.detach(), 8, is_packed=False).needs_backward


@pytest.fixture
def chosen_for(monkeypatch):
    """The problems that "auto" chose for."""
    found = []

    def spy(op, problem):
        found.append(problem)
        return choose(op, problem)

    choose = backends_module._resolve_auto
    monkeypatch.setattr(backends_module, "_resolve_auto", spy)
    torch.compiler.reset()
    return found


def test_a_graph_for_many_sizes_stays_one(chosen_for):
    compiled = torch.compile(lambda *x: wkv7(*x, None, PLAIN)[0].sum(), fullgraph=True, backend="aot_eager")
    for n_tokens in (9, 10, 40, 23):
        inputs = [torch.full((2, n_tokens, 2, 8), -0.5, requires_grad=True) for _ in range(6)]
        expected = wkv7(*inputs, None, PLAIN, backend="cpp")[0].sum()
        assert torch.equal(compiled(*inputs), expected)
    # The first size is a constant of its graph; the second shows PyTorch that sizes change.
    assert [(problem.n_recurrences, problem.n_tokens) for problem in chosen_for] == [(4, 8), (None, None)]


def test_a_run_takes_the_users_table_of_this_chip(monkeypatch, tmp_path):
    monkeypatch.setenv("RWKV_TRAIN_KERNELS", str(tmp_path))
    here = Chip("a chip of this test", None)
    write(tmp_path / "crossover", content_of(here, op="tested"), here)
    loaded = []
    register_operator(
        "tested",
        {
            "first": row(load=lambda: loaded.append("first")),
            "second": row(load=lambda: loaded.append("second")),
        },
    )
    problem = ON_H200._replace(capability=None, chip=here.name, n_recurrences=512, n_tokens=2048)
    choice = prepare("tested", problem, "auto")
    assert choice.name == "second"
    assert str(tmp_path / "crossover" / here.file_name) in choice.reason
    assert prepare("tested", problem._replace(dtype=torch.float32), "auto").name == "first"
    assert loaded == ["second", "first"]


def test_a_backend_that_cannot_be_loaded_is_tried_for_one_problem_only(monkeypatch, tmp_path):
    monkeypatch.setenv("RWKV_TRAIN_KERNELS", str(tmp_path))
    tried = []

    def cannot_load():
        tried.append(1)
        raise BackendError("no compiler")

    register_operator("tested too", {"broken": row(load=cannot_load), "whole": row()})
    for n_tokens in (1, 2, 4):
        assert prepare("tested too", ON_H200._replace(n_tokens=n_tokens), "auto").name == "whole"
    assert len(tried) == 1
    with pytest.raises(BackendError, match="no compiler"):
        prepare("tested too", ON_H200, "broken")


def test_only_what_auto_could_take_and_was_not_there_when_it_was_measured_is_newer():
    table = {
        "refusing": row("it needs luck"),
        "rough": row(in_auto=False),
        "new": row(),
        "broken": row(),
        "too large here": row(),
        "old": row(),
        "reference": row(),
    }
    found = Speeds({"old": SLOW}, "at such a size", {"old", "too large here"})
    assert newer_backends(table, ON_H200, {"broken": "no compiler"}, found) == ["new"]
    # There the order of the table decides.
    assert newer_backends(table, ON_H200, {"old": "no compiler"}, found) == []
    assert newer_backends(table, ON_H200, {}, Speeds({}, "no speeds were measured")) == []


def test_a_table_older_than_a_backend_is_warned_of_once_for_each_case(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("RWKV_TRAIN_KERNELS", str(tmp_path))
    here = Chip("a chip with an old table", None)
    write(tmp_path / "crossover", content_of(here, op="tested late"), here)
    register_operator("tested late", {"new": row(), "first": row(), "second": row()})
    problem = ON_H200._replace(capability=None, chip=here.name, n_recurrences=512, n_tokens=2048)
    for n_tokens in (1024, 2048, 4096):
        assert prepare("tested late", problem._replace(n_tokens=n_tokens), "auto").name == "second"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "tested late (bfloat16, forward+backward, heads of 64): 'auto' chooses by times that were measured "
        "without new, which is therefore never chosen; measure again with "
        "'rwkv-train bench kernels --tune --op tested late --dtype bf16 --overwrite'"
    )
    # Of what the table does not have no old time is looked at, and the new one is chosen.
    assert prepare("tested late", problem._replace(dtype=torch.float32), "auto").name == "new"
    assert len(caplog.records) == 1
