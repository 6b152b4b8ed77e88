"""RWKV-6 on the CPU in C++ (``cuda/wkv6/wkv6_cpu.cpp``): float32 inside, whatever the dtype of the inputs."""

from rwkv_train.ops.cpp_recurrence import cpp_recurrence

CHECKPOINT_TOKENS = 32
"""Tokens from one kept state to the next; the source says the same, which loading checks."""

load, wkv6_cpp = cpp_recurrence(
    "wkv6",
    inputs=("r", "w", "k", "v", "u", "state"),
    n_sizes=2,
    checkpoint_tokens=CHECKPOINT_TOKENS,
    shared=("u",),
)
