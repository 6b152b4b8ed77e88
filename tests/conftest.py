"""Settings of the whole suite."""

import os
from pathlib import Path

BEGIN_FIRST = (
    "ops/test_cuda_chunked_emulated.py",
    "training/test_parity.py",
    "training/test_run.py",
    "training/test_processes.py",
    "training/test_guard.py",
    "training/test_compile.py",
    "checkpoints/test_deepspeed_folder.py",
    "benchmarks/test_trials.py",
    "test_wheel.py",
)
"""Files that take half a minute or more, the longest first: begun last, one would keep the suite waiting at its end."""

# As rwkv_train.commands.main does: tests share their cores with other processes, some of them their own.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# One thread each where several processes share out the tests; read when torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tables of speeds that a developer measured lie beside the built kernels. They must not choose what the tests, and the
# processes that these start, compute with: so the suite builds into a folder of its own.
kernels = Path(os.environ.get("RWKV_TRAIN_KERNELS") or "~/.cache/rwkv-train/kernels").expanduser().absolute()
if kernels.name != "of-the-tests":  # else it is a process of the suite
    os.environ["RWKV_TRAIN_KERNELS"] = str(kernels / "of-the-tests")


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.as_posix()
        return next((i for i, name in enumerate(BEGIN_FIRST) if path.endswith(f"/{name}")), len(BEGIN_FIRST))

    items.sort(key=place)
