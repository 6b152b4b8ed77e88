"""The choice of a backend, which needs neither tensors nor a GPU, and what follows when one cannot be had."""

import subprocess
import sys

import pytest
import torch

from rwkv_train.errors import BackendError
from rwkv_train.ops.backends import Backend, Problem, choose_backend, kernel_for, resolve_backend
from rwkv_train.ops.context import PLAIN
from rwkv_train.ops.crossover import Speeds
from rwkv_train.ops.prepare import OPERATORS, prepare_backend
from rwkv_train.ops.wkv7 import BACKENDS as WKV7_BACKENDS

ON_CPU = Problem("cpu", torch.float32, 64)
ON_GPU = Problem("cuda", torch.float32, 64, capability=90)
FOR_TENSOR_CORES = ON_GPU._replace(dtype=torch.bfloat16)
ALL = pytest.mark.parametrize("backends", list(OPERATORS.values()), ids=list(OPERATORS))


@ALL
@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (ON_CPU, "cpp"),
        (Problem("cpu", torch.bfloat16, 20), "cpp"),
        (Problem("cpu", torch.float64, 64), "torch"),
        (ON_GPU, "cuda_exact"),
        (ON_GPU._replace(capability=None), "cuda_exact"),
        (ON_GPU._replace(capability=75, head_size=None), "cuda_exact"),
        (FOR_TENSOR_CORES._replace(head_size=32), "cuda_exact"),
        (FOR_TENSOR_CORES._replace(capability=75), "cuda_exact"),
        (ON_GPU._replace(capability=61), "torch"),
        (ON_GPU._replace(dtype=torch.float64), "torch"),
    ],
    ids=[
        "cpu",
        "cpu-bfloat16",
        "cpu-float64",
        "gpu",
        "gpu-unknown",
        "gpu-oldest",
        "gpu-other-heads",
        "gpu-before-bfloat16",
        "gpu-older",
        "gpu-float64",
    ],
)
def test_auto_takes_the_fastest_backend_that_fits(backends, problem, expected):
    assert choose_backend(backends, problem, "auto").name == expected


@pytest.mark.parametrize("op", ["wkv5", "wkv6", "wkv7"])
@pytest.mark.parametrize(
    "change",
    [{}, {"head_size": 128}, {"capability": 80}, {"is_packed": True}],
    ids=["usual", "heads-128", "oldest", "packed"],
)
def test_auto_takes_tensor_cores_for_bfloat16(op, change):
    assert choose_backend(OPERATORS[op], FOR_TENSOR_CORES._replace(**change), "auto").name == "cuda"


def test_wkv4_has_no_kernels_on_tensor_cores():
    assert choose_backend(OPERATORS["wkv4"], FOR_TENSOR_CORES, "auto").name == "cuda_exact"


def test_auto_never_takes_the_less_precise_backend():
    """Not where it is the fastest, nor where the others cannot be loaded."""
    speeds = Speeds({"cuda_bf16": 1.0, "cuda": 2.0, "cuda_exact": 3.0}, "measured here")
    assert choose_backend(WKV7_BACKENDS, FOR_TENSOR_CORES, "auto", speeds=speeds).name == "cuda"
    broken = {"cuda": "it does not compile", "cuda_exact": "it does not compile"}
    assert choose_backend(WKV7_BACKENDS, FOR_TENSOR_CORES, "auto", broken, speeds).name == "torch"
    assert choose_backend(WKV7_BACKENDS, FOR_TENSOR_CORES, "cuda_bf16").name == "cuda_bf16"


def test_the_reason_says_why_no_faster_backend_was_taken():
    backends = OPERATORS["wkv4"]
    assert choose_backend(backends, ON_GPU, "auto").reason == (
        "'cuda_exact' is the first in the usual order; no speeds were measured"
    )
    assert choose_backend(backends, ON_GPU._replace(capability=61), "auto").reason == (
        "'torch' is the first in the usual order that can run here (not cuda_exact: it needs a GPU of sm_70 or "
        "later, not sm_61; not cpp: it needs CPU tensors, not cuda); no speeds were measured"
    )


@ALL
def test_a_backend_asked_for_by_name_is_never_replaced(backends):
    assert choose_backend(backends, ON_CPU, "reference").name == "reference"
    with pytest.raises(BackendError, match="'cpp' cannot run this problem: it needs CPU tensors, not cuda"):
        choose_backend(backends, ON_GPU, "cpp")
    with pytest.raises(BackendError, match=r"'cpp' .*: it computes in float32, not torch\.float64"):
        choose_backend(backends, Problem("cpu", torch.float64, 64), "cpp")
    with pytest.raises(
        BackendError, match="'cuda_exact' cannot run this problem: it needs CUDA tensors, not cpu"
    ):
        choose_backend(backends, ON_CPU, "cuda_exact")
    with pytest.raises(BackendError, match=r"'cuda_exact' .*: it computes in float32, not torch\.float64"):
        choose_backend(backends, ON_GPU._replace(dtype=torch.float64), "cuda_exact")


@ALL
@pytest.mark.parametrize("head_size", [8, 64, 120, 128])
def test_cuda_exact_takes_heads_in_steps_of_8(backends, head_size):
    assert choose_backend(backends, ON_GPU._replace(head_size=head_size), "auto").name == "cuda_exact"


@ALL
@pytest.mark.parametrize("head_size", [1, 20, 136])
def test_other_heads_are_left_to_torch(backends, head_size):
    problem = ON_GPU._replace(head_size=head_size)
    assert choose_backend(backends, problem, "auto").name == "torch"
    said = f"it needs head sizes of 8 to 128 in steps of 8, not {head_size}"
    with pytest.raises(BackendError, match=said):
        choose_backend(backends, problem, "cuda_exact")


@ALL
def test_an_unknown_name_is_answered_with_the_known_ones(backends):
    with pytest.raises(
        BackendError, match=r"no backend 'fast'; choose one of auto, .*cuda_exact, cpp, torch, reference"
    ):
        choose_backend(backends, ON_CPU, "fast")


@pytest.mark.parametrize("op", list(OPERATORS))
def test_the_operators_refuse_as_the_choice_does(operators, op):
    with pytest.raises(BackendError, match="'cpp' cannot run this problem: it computes in float32"):
        operators[op].run(*(x.double() for x in operators[op].problem().inputs), PLAIN, backend="cpp")


def _table_with_a_broken_backend():
    def cannot_load():
        raise BackendError("no C++ compiler was found")

    return {
        "broken": Backend(refuses=lambda problem: None, load=cannot_load, run=WKV7_BACKENDS["torch"].run),
        "torch": WKV7_BACKENDS["torch"],
    }


def test_auto_passes_over_a_backend_that_cannot_be_loaded_and_says_so(caplog):
    choice = resolve_backend(_table_with_a_broken_backend(), ON_CPU, "auto")
    assert choice.name == "torch"
    assert "the backend 'broken' is passed over: no C++ compiler was found" in caplog.text
    assert "not broken: no C++ compiler was found" in choice.reason


def test_a_backend_asked_for_by_name_that_cannot_be_loaded_raises():
    with pytest.raises(BackendError, match="no C\\+\\+ compiler was found"):
        resolve_backend(_table_with_a_broken_backend(), ON_CPU, "broken")


def test_auto_says_of_each_backend_why_none_runs():
    table = {"cpp": WKV7_BACKENDS["cpp"]}
    with pytest.raises(BackendError, match=r"no backend can run this problem \(not cpp: it needs CPU"):
        choose_backend(table, ON_GPU, "auto")


@pytest.mark.parametrize("op", list(OPERATORS))
def test_preparing_a_backend_loads_it_and_names_it(op):
    assert prepare_backend(op, ON_CPU, "cpp").name == "cpp"
    assert prepare_backend(op, ON_CPU, "auto").name == "cpp"
    assert prepare_backend(op, ON_CPU, "torch").reason == "'torch' was asked for by name"


@pytest.mark.parametrize("op", list(OPERATORS))
def test_the_kernel_of_a_name_is_that_of_the_table(op):
    assert kernel_for(op, ON_CPU, "auto") is OPERATORS[op]["cpp"].run
    assert kernel_for(op, ON_CPU, "torch") is OPERATORS[op]["torch"].run


def test_importing_the_operators_builds_and_prints_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import rwkv_train.ops.prepare"],
        env={"HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert not (tmp_path / ".cache").exists()
