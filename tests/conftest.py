"""Settings of the whole suite."""

import os

# As rwkv_train.commands.main does: tests share their cores with other processes, some of them their own.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# One thread each where several processes share out the tests; read when torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
