"""RWKV-7 on a GPU in CUDA (``cuda/wkv7/wkv7.cu``): float32 inside, whatever the dtype of the inputs."""

from rwkv_train.ops.compiled import Signature
from rwkv_train.ops.cuda_recurrence import cuda_recurrence

SIGNATURE = Signature(
    "wkv7",
    inputs=("r", "w", "k", "v", "a", "b", "state"),
    n_sizes=2,
    checkpoint_tokens=16,
)

load, wkv7_cuda_exact = cuda_recurrence(SIGNATURE, "cuda_exact")
