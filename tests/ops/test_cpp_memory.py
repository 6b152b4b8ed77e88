"""The C++ kernels write all of their outputs and nothing else; called with raw addresses, as Python does."""

import pytest
import torch

from rwkv_train.ops.compiled import addresses
from rwkv_train.ops.prepare import OPERATORS
from rwkv_train.ops.wkv4 import cpp as wkv4_cpp
from rwkv_train.ops.wkv5 import cpp as wkv5_cpp
from rwkv_train.ops.wkv6 import cpp as wkv6_cpp
from rwkv_train.ops.wkv7 import cpp as wkv7_cpp

GUARD = 64
GUARD_VALUE = 12288.0  # a float16 and a bfloat16 too


class Guarded:
    """Tensors, each amid numbers that must stay as they are; outputs start as NaN."""

    def __init__(self, device="cpu") -> None:
        self.device = device
        self.buffers: list[torch.Tensor] = []

    def output(self, *shape, dtype=torch.float32):
        return self.copy(torch.full(shape, torch.nan, dtype=dtype))

    def copy(self, x):
        buffer = torch.full((x.numel() + 2 * GUARD,), GUARD_VALUE, dtype=x.dtype, device=self.device)
        inside = buffer[GUARD:-GUARD].view(x.shape)
        inside.copy_(x)
        self.buffers.append(buffer)
        return inside

    def assert_untouched(self):
        for buffer in self.buffers:
            assert (buffer[:GUARD] == GUARD_VALUE).all()
            assert (buffer[-GUARD:] == GUARD_VALUE).all()


# Rows of sequences, empty ones and ones of whole intervals among them; the last channels are no whole vector.
LENGTHS = {"one-token": [1], "plain": [37, 37], "packed": [0, 33, 1, 64, 0, 32, 7, 0]}
CHANNELS = {"one": (1, 1), "usual": (2, 64), "odd": (13, 17)}


@pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))
@pytest.mark.parametrize(("n_head", "head_size"), list(CHANNELS.values()), ids=list(CHANNELS))
@pytest.mark.parametrize("op", list(OPERATORS))
def test_it_writes_all_of_its_outputs_and_nothing_else(operators, op, lengths, n_head, head_size):
    backend = {"wkv4": wkv4_cpp, "wkv5": wkv5_cpp, "wkv6": wkv6_cpp, "wkv7": wkv7_cpp}[op]
    n_tokens, n_sequences = sum(lengths), len(lengths)
    sizes = (n_head * head_size,) if op == "wkv4" else (n_head, head_size)
    options = {"n_embd": sizes[0]} if op == "wkv4" else {"n_head": n_head, "head_size": head_size}
    problem = operators[op].packed_problem(lengths, **options)
    state = problem.inputs[-1]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    n_checkpoints = n_tokens // backend.CHECKPOINT_TOKENS + n_sequences

    guarded = Guarded()
    inputs = [guarded.copy(x) for x in problem.inputs]
    y, final_state = guarded.output(*problem.dy.shape), guarded.output(*state.shape)
    checkpoints = guarded.output(n_checkpoints, *state.shape[1:])
    gradients = [
        guarded.output(*((n_sequences, *x.shape) if i in operators[op].shared else x.shape))
        for i, x in enumerate(inputs)
    ]
    given = [guarded.copy(problem.dy), guarded.copy(torch.ones_like(state))]

    library = backend.load()
    forward, backward = (getattr(library, f"rwkv_{op}_{name}") for name in ("forward", "backward"))
    forward(n_sequences, *sizes, *addresses(cu_seqlens, *inputs, y, final_state, checkpoints), 2)
    backward(n_sequences, *sizes, *addresses(cu_seqlens, *inputs[:-1], checkpoints, *given, *gradients), 2)

    guarded.assert_untouched()
    for output in (y, final_state, checkpoints, *gradients):
        assert output.isfinite().all()
