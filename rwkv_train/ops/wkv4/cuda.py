"""RWKV-4 on a GPU in CUDA (``cuda/wkv4/wkv4.cu``): float32 inside, whatever the dtype of the inputs."""

from rwkv_train.ops.compiled import Signature
from rwkv_train.ops.cuda_recurrence import cuda_recurrence

SIGNATURE = Signature(
    "wkv4",
    inputs=("w", "u", "k", "v", "state"),
    n_sizes=1,
    checkpoint_tokens=16,
    shared=("w", "u"),
)

load, wkv4_cuda_exact = cuda_recurrence(SIGNATURE, "cuda_exact")
