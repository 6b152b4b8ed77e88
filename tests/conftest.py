"""Settings of the whole suite."""

import os
from pathlib import Path

BEGIN_FIRST = (
    "campaigns/test_slices.py",
    "training/test_parity.py",
    "benchmarks/test_trials.py",
    "checkpoints/test_deepspeed_folder.py",
    "training/test_processes.py",
)
"""Files that take a minute or more: begun last, one of them would keep the suite waiting at its end."""

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
    items.sort(key=lambda item: not item.path.as_posix().endswith(BEGIN_FIRST))
