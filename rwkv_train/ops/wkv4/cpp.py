"""RWKV-4 on the CPU in C++ (``cuda/wkv4/wkv4_cpu.cpp``): float32 inside, whatever the dtype of the inputs."""

from rwkv_train.ops.cpp_recurrence import cpp_recurrence

CHECKPOINT_TOKENS = 32
"""Tokens from one kept state to the next; the source says the same, which loading checks."""

load, wkv4_cpp = cpp_recurrence(
    "wkv4",
    inputs=("w", "u", "k", "v", "state"),
    n_sizes=1,
    checkpoint_tokens=CHECKPOINT_TOKENS,
    shared=("w", "u"),
)
