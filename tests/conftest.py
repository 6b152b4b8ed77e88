"""Settings of the whole suite."""

import os

# As rwkv_train.commands.main does: tests share their cores with other processes, some of them their own.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
