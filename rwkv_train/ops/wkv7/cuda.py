"""RWKV-7 on a GPU in CUDA (``cuda/wkv7/``).

``cuda_exact``: float32 inside, whatever the dtype of the inputs. ``cuda``: chunks of tokens on tensor cores, from
bfloat16 to bfloat16; ``cuda_bf16``: the same, with the factors of every product in bfloat16.
"""

from rwkv_train.ops.compiled import Signature
from rwkv_train.ops.cuda_recurrence import chunked, cuda_recurrence

SIGNATURE = Signature(
    "wkv7",
    inputs=("r", "w", "k", "v", "a", "b", "state"),
    n_sizes=2,
    checkpoint_tokens=16,
)

load_exact, wkv7_cuda_exact = cuda_recurrence(SIGNATURE, "cuda_exact")
load_cuda, wkv7_cuda = cuda_recurrence(chunked(SIGNATURE), "cuda")
load_bf16, wkv7_cuda_bf16 = cuda_recurrence(chunked(SIGNATURE, "_chunked_bf16"), "cuda_bf16")
