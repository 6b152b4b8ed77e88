"""What is tried in a process of its own: packages are imported, each backend of each operator is built and run.

A broken package or kernel may end the process that loads it, print what it likes, or hang. So this module is the main
program of another process (``probe.py`` starts it), to which it writes lines of JSON: ``{"begin": name}``, ``{"end":
name, "facts": {...}}`` and, while a kernel is built, ``{"progress": sentence}``.
"""

import functools
import importlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Facts = dict[str, Any]
Attempt = tuple[str, Callable[[], Facts]]

HEAD_SIZE = 64
"""That of nearly all published models."""
N_HEADS = 2
N_TOKENS = 70
"""More than the kernels keep between two of their checkpoints, and no multiple of it."""
DTYPES = ("float32", "bfloat16")
TRAINED_TOKENS = 4096
"""Of a sequence in a step of training, for which it is said what "auto" takes."""
TRAINED_HEADS = 256
"""Of all its sequences, likewise; of the operator without heads HEAD_SIZE channels for each."""
TOLERANCE = 0.05
"""Greatest error, relative to the greatest value. Rounding to bfloat16 costs 0.01; a wrong kernel is off by about 1."""

UNFINISHED = 3
"""Exit code after an error that outlasts its attempt; the other attempts are for the next process."""

_SHAPES = {
    "wkv4": {"w": "C", "u": "C", "k": "BTC", "v": "BTC"},
    "wkv5": {"r": "BTHN", "w": "HN", "k": "BTHN", "v": "BTHN", "u": "HN"},
    "wkv6": {"r": "BTHN", "w": "BTHN", "k": "BTHN", "v": "BTHN", "u": "HN"},
    "wkv7": {"r": "BTHN", "w": "BTHN", "k": "BTHN", "v": "BTHN", "a": "BTHN", "b": "BTHN"},
}
"""Inputs of each operator."""
_SIZES = {"B": 1, "T": N_TOKENS, "H": N_HEADS, "N": HEAD_SIZE, "C": N_HEADS * HEAD_SIZE}
_FLOAT32_INPUTS = ("w", "u")


def main() -> None:
    """Try what is not in the JSON object of ``sys.argv[1]``: name -> whether it went well, in another process."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print is not for the reader of our lines

    def tell(**line: Any) -> None:
        lines.write(json.dumps(line) + "\n")
        lines.flush()

    logger = logging.getLogger("rwkv_train")
    logger.addHandler(_Teller(tell))
    logger.propagate = False
    done: dict[str, bool] = json.loads(sys.argv[1])
    for name, attempt in attempts(done):
        tell(begin=name)
        try:
            facts = attempt()
        except BaseException as error:  # noqa: BLE001 - whatever a broken package raises is what is looked for
            facts = {"problem": sentence(error), "kind": type(error).__name__}
        done[name] = "problem" not in facts
        tell(end=name, facts=facts)
        if facts.get("is_lasting"):
            break
    else:
        os._exit(0)  # what a broken package does when a process ends does not matter
    os._exit(UNFINISHED)


def attempts(done: Mapping[str, bool]) -> Iterator[Attempt]:
    """Yield what is to be tried; what needs a package comes only where that package can be imported.

    Args:
        done: name of what has been tried -> whether it went well; filled while the attempts are made.
    """
    packages: tuple[tuple[str, str | None, Callable[[], Facts]], ...] = (
        ("torch", None, _try_torch),
        ("backends", "torch", _list_backends),
        ("lightning", "torch", lambda: _try_package("lightning.pytorch", "lightning")),
        ("training", "lightning", _try_training),
        ("deepspeed", "torch", _try_deepspeed),
    )
    for name, needed, attempt in packages:
        if name not in done and (needed is None or done.get(needed)):
            yield name, attempt
    if done.get("backends"):
        failures: dict[tuple[str, str], str] = {}
        for name in _trials():
            if name not in done:
                yield name, functools.partial(try_backend, *name.split(), failures=failures)


class _Teller(logging.Handler):
    """Passes on what the build of a kernel says while it runs."""

    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(progress=record.getMessage())


def sentence(error: BaseException) -> str:
    """Return what an error says, in one line and not too long."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text[:400] or type(error).__name__


def _try_package(module: str, distribution: str) -> Facts:
    importlib.import_module(module)
    return {"version": importlib.metadata.version(distribution)}


def _try_torch() -> Facts:
    import torch  # noqa: PLC0415

    facts: Facts = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cuda_devices": torch.cuda.device_count(),
        "architectures": torch.cuda.get_arch_list(),
        "devices": [],
        "cuda_problem": None,
    }
    try:
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            facts["devices"].append(
                {
                    "name": found.name,
                    "capability": f"{found.major}.{found.minor}",
                    "memory_bytes": found.total_memory,
                }
            )
    except (RuntimeError, AssertionError) as error:
        facts["cuda_problem"] = sentence(error)
    return facts


def _try_training() -> Facts:
    """Import all that a run needs, and ask which device it would take."""
    importlib.import_module("rwkv_train.training.run")
    from rwkv_train.config.trainer import TrainerConfig  # noqa: PLC0415
    from rwkv_train.training.strategy import device_of  # noqa: PLC0415

    return {"device": device_of(TrainerConfig(out_dir="unused", max_steps=1)).type}


def _try_deepspeed() -> Facts:
    """Ask DeepSpeed which of its optimizers of ours it could compile, without compiling one."""
    import torch  # noqa: PLC0415

    has_gpu = torch.cuda.device_count() > 0
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as training does; read when DeepSpeed is imported
    facts = _try_package("deepspeed", "deepspeed")
    builders = importlib.import_module("deepspeed.ops.op_builder")
    facts["ops"] = {"cpu_adam": _op_problem(builders.CPUAdamBuilder)}
    if has_gpu:
        facts["ops"]["fused_adam"] = _op_problem(builders.FusedAdamBuilder, needs_cuda=True)
    return facts


def _op_problem(builder: Any, *, needs_cuda: bool = False) -> str | None:
    """Say why an operator of DeepSpeed cannot be compiled here, or ``None``."""
    try:
        made = builder()
        if not made.is_compatible(verbose=False):
            return str(made.error_log or "it says that it is not compatible")
        # What is_compatible says nothing of, because it is asked only when something is compiled.
        tools = importlib.import_module("torch.utils.cpp_extension")
        tools.verify_ninja_availability()
        if shutil.which(tools.get_cxx_compiler()) is None:
            return f"there is no compiler '{tools.get_cxx_compiler()}'"
        if needs_cuda:
            parts = importlib.import_module("deepspeed.ops.op_builder.builder")
            parts.assert_no_cuda_mismatch(made.name)
    except Exception as error:  # noqa: BLE001 - its builders raise errors of many kinds
        return sentence(error)
    return None


def _list_backends() -> Facts:
    """Name the trials, and for each ``"DEVICE OP DTYPE"`` what "auto" takes, if not that, and so on."""
    from rwkv_train.ops.prepare import OPERATORS  # noqa: PLC0415

    preferences = {
        f"{device} {op} {dtype}": _preferred(op, device, dtype)
        for device in _devices()
        for op in OPERATORS
        for dtype in DTYPES
    }
    return {"trials": _trials(), "preferences": preferences}


def _trials() -> list[str]:
    """Name the trials of all backends, ``"DEVICE OP BACKEND DTYPE"``."""
    from rwkv_train.ops.prepare import OPERATORS  # noqa: PLC0415

    return [
        f"{device} {op} {backend} {dtype}"
        for device in _devices()
        for op, backends in OPERATORS.items()
        for backend in backends
        for dtype in DTYPES
    ]


def _devices() -> list[str]:
    import torch  # noqa: PLC0415

    return [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), "cpu"]


def _preferred(op: str, device_name: str, dtype_name: str) -> list[str]:
    """Return what "auto" may take for a step of training: measured backends by their times, then the others."""
    import torch  # noqa: PLC0415

    from rwkv_train.ops.backends import NOTHING_MEASURED, Problem, speeds_for  # noqa: PLC0415
    from rwkv_train.ops.chip import capability_of, chip_name  # noqa: PLC0415
    from rwkv_train.ops.prepare import OPERATORS  # noqa: PLC0415

    device, head_size = torch.device(device_name), None if op == "wkv4" else HEAD_SIZE
    speeds = NOTHING_MEASURED
    with suppress(RuntimeError, AssertionError):  # where CUDA does not start, its trials say so
        problem = Problem(
            device.type,
            getattr(torch, dtype_name),
            head_size,
            capability=capability_of(device),
            chip=chip_name(device),
            n_recurrences=TRAINED_HEADS * (HEAD_SIZE if head_size is None else 1),
            n_tokens=TRAINED_TOKENS,
            needs_backward=True,
        )
        speeds = speeds_for(op, problem)
    times = speeds.milliseconds
    names = (name for name, backend in OPERATORS[op].items() if backend.in_auto)
    return sorted(names, key=lambda name: times.get(name, math.inf))


def try_backend(
    device_name: str, op: str, name: str, dtype_name: str, *, failures: dict[tuple[str, str], str]
) -> Facts:
    """Load a backend as training does, and compare a small problem with the float64 loop.

    Args:
        device_name: ``"cpu"`` or ``"cuda:0"``.
        op: name of an operator.
        name: name of a backend.
        dtype_name: of r, k, v, a and b.
        failures: libraries that could not be loaded, by operator and device, each with its sentence; filled here, so
            that a build that fails does so once.
    """
    import torch  # noqa: PLC0415

    from rwkv_train.errors import BackendError  # noqa: PLC0415
    from rwkv_train.ops.backends import Problem  # noqa: PLC0415
    from rwkv_train.ops.chip import capability_of  # noqa: PLC0415
    from rwkv_train.ops.prepare import OPERATORS  # noqa: PLC0415

    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    backend = OPERATORS[op][name]
    head_size = None if op == "wkv4" else HEAD_SIZE
    problem = Problem(device.type, dtype, head_size, capability=capability_of(device))
    if (why_not := backend.refuses(problem)) is not None:
        return {"status": "refuses", "reason": why_not}
    started = time.perf_counter()
    library = op, name.partition("_")[0]  # cuda_exact is in that of cuda
    try:
        if library in failures:
            raise BackendError(failures[library])
        backend.load()
    except BackendError as error:
        failures[library] = str(error)
        return {"status": "unavailable", "reason": str(error)}
    load_seconds = time.perf_counter() - started
    try:
        error_size = _error_of(op, name, device, dtype)
    except BackendError as error:
        return {"status": "unavailable", "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - CUDA and torch raise errors of many kinds
        return {"status": "fails", "reason": sentence(error), "is_lasting": _is_lasting(device)}
    if not error_size <= TOLERANCE:
        return {"status": "wrong", "reason": f"its numbers are wrong (relative error {error_size:.2g})"}
    return {"status": "available", "reason": None, "load_seconds": round(load_seconds, 2)}


def _error_of(op: str, backend: str, device: "torch.device", dtype: "torch.dtype") -> float:
    """Return the greatest relative error of an operator's output and gradients; NaN where they are not numbers."""
    import torch  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, letters in _SHAPES[op].items():
        x = torch.randn([_SIZES[letter] for letter in letters], generator=generator)
        x = -0.1 * x.exp() if name == "w" else 0.1 * x
        inputs[name] = x.to(torch.bfloat16)  # so that both dtypes have the same numbers
    wanted = _results(op, "reference", {name: x.double() for name, x in inputs.items()})
    got = _results(
        op,
        backend,
        {
            name: x.to(device, torch.float32 if name in _FLOAT32_INPUTS else dtype)
            for name, x in inputs.items()
        },
    )
    errors = [
        float((y.double().cpu() - x).abs().max() / x.abs().max()) for x, y in zip(wanted, got, strict=True)
    ]
    return max(errors, key=lambda error: (math.isnan(error), error))  # a NaN counts as the greatest


def _results(op: str, backend: str, inputs: "Mapping[str, Tensor]") -> "list[Tensor]":
    """Return the output and the gradient of each input."""
    import torch  # noqa: PLC0415

    from rwkv_train.ops.context import PLAIN  # noqa: PLC0415

    function = getattr(importlib.import_module(f"rwkv_train.ops.{op}"), op)
    given = {name: x.requires_grad_() for name, x in inputs.items()}
    y, _ = function(**given, state=None, context=PLAIN, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.double().square().sum(), list(given.values()))]


def _is_lasting(device: "torch.device") -> bool:
    """Tell whether CUDA is out of order for this process, as after an access to memory that is not there."""
    import torch  # noqa: PLC0415

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:  # noqa: BLE001 - of whatever kind
        return True
    return False
