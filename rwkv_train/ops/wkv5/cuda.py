"""RWKV-5 on a GPU in CUDA (``cuda/wkv5/``).

``cuda_exact``: float32 inside, whatever the dtype of the inputs. ``cuda``: chunks of tokens on tensor cores, from
bfloat16 to bfloat16.
"""

from rwkv_train.ops.compiled import Signature
from rwkv_train.ops.cuda_recurrence import chunked, cuda_recurrence

SIGNATURE = Signature(
    "wkv5",
    inputs=("r", "w", "k", "v", "u", "state"),
    n_sizes=2,
    checkpoint_tokens=16,
    shared=("w", "u"),
)

load_exact, wkv5_cuda_exact = cuda_recurrence(SIGNATURE, "cuda_exact")
load_cuda, wkv5_cuda = cuda_recurrence(chunked(SIGNATURE), "cuda")
