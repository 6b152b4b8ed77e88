"""RWKV-6 on a GPU in CUDA (``cuda/wkv6/wkv6.cu``): float32 inside, whatever the dtype of the inputs."""

from rwkv_train.ops.compiled import Signature
from rwkv_train.ops.cuda_recurrence import cuda_recurrence

SIGNATURE = Signature(
    "wkv6",
    inputs=("r", "w", "k", "v", "u", "state"),
    n_sizes=2,
    checkpoint_tokens=16,
    shared=("u",),
)

load, wkv6_cuda_exact = cuda_recurrence(SIGNATURE, "cuda_exact")
