"""RWKV-7 on the CPU in C++ (``cuda/wkv7/wkv7_cpu.cpp``): float32 inside, whatever the dtype of the inputs."""

from rwkv_train.ops.cpp_recurrence import cpp_recurrence

CHECKPOINT_TOKENS = 32
"""Tokens from one kept state to the next; the source says the same, which loading checks."""

load, wkv7_cpp = cpp_recurrence(
    "wkv7",
    inputs=("r", "w", "k", "v", "a", "b", "state"),
    n_sizes=2,
    checkpoint_tokens=CHECKPOINT_TOKENS,
)
