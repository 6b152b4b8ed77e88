"""The C++ kernels write all of their outputs and nothing else; called with raw addresses, as Python does."""

import pytest
import torch

from rwkv_train.ops.cpp import addresses
from rwkv_train.ops.wkv4 import cpp as wkv4_cpp
from rwkv_train.ops.wkv5 import cpp as wkv5_cpp
from rwkv_train.ops.wkv6 import cpp as wkv6_cpp
from rwkv_train.ops.wkv7 import cpp as wkv7_cpp

GUARD = 64
GUARD_VALUE = 12345.0


class Guarded:
    """Tensors, each amid numbers that must stay as they are; outputs start as NaN."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def output(self, *shape):
        return self.copy(torch.full(shape, torch.nan))

    def copy(self, x):
        buffer = torch.full((x.numel() + 2 * GUARD,), GUARD_VALUE)
        inside = buffer[GUARD:-GUARD].view(x.shape)
        inside.copy_(x)
        self.buffers.append(buffer)
        return inside

    def assert_untouched(self):
        for buffer in self.buffers:
            assert (buffer[:GUARD] == GUARD_VALUE).all()
            assert (buffer[-GUARD:] == GUARD_VALUE).all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 37, 3, 20), (1, 33, 2, 64), (1, 40, 13, 17)], ids=str)
def test_wkv7_writes_all_of_its_outputs_and_nothing_else(wkv7_problem, shape):
    batch, n_tokens, n_head, head_size = shape
    problem = wkv7_problem(batch, n_tokens, n_head, head_size)
    guarded = Guarded()
    inputs = [guarded.copy(x) for x in problem.inputs]
    state_shape = problem.d_final.shape
    n_checkpoints = -(-n_tokens // wkv7_cpp.CHECKPOINT_TOKENS)
    y, final_state = guarded.output(*shape), guarded.output(*state_shape)
    checkpoints = guarded.output(batch, n_head, n_checkpoints, head_size, head_size)
    library = wkv7_cpp.load()

    library.rwkv_wkv7_forward(*shape, *addresses(*inputs, y, final_state, checkpoints), 2)
    gradients = [guarded.output(*shape) for _ in range(6)] + [guarded.output(*state_shape)]
    given = [guarded.copy(problem.dy), guarded.copy(problem.d_final)]
    library.rwkv_wkv7_backward(*shape, *addresses(*inputs[:-1], checkpoints, *given, *gradients), 2)

    guarded.assert_untouched()
    for output in (y, final_state, checkpoints, *gradients):
        assert output.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 37, 3, 20), (1, 33, 2, 64), (1, 40, 13, 17)], ids=str)
@pytest.mark.parametrize("op", ["wkv5", "wkv6"])
def test_wkv5_and_wkv6_write_all_of_their_outputs_and_nothing_else(operators, op, shape):
    batch, n_tokens, n_head, head_size = shape
    problem = operators[op].problem(batch=batch, n_tokens=n_tokens, n_head=n_head, head_size=head_size)
    backend = {"wkv5": wkv5_cpp, "wkv6": wkv6_cpp}[op]
    library = backend.load()
    forward, backward = (getattr(library, f"rwkv_{op}_{name}") for name in ("forward", "backward"))
    guarded = Guarded()
    inputs = [guarded.copy(x) for x in problem.inputs]
    state_shape, by_row = problem.d_final.shape, (batch, n_head, head_size)
    n_checkpoints = -(-n_tokens // backend.CHECKPOINT_TOKENS)
    y, final_state = guarded.output(*shape), guarded.output(*state_shape)
    checkpoints = guarded.output(batch, n_head, n_checkpoints, head_size, head_size)

    forward(*shape, *addresses(*inputs, y, final_state, checkpoints), 2)
    dw_shape = by_row if op == "wkv5" else shape
    gradients = [guarded.output(*size) for size in (shape, dw_shape, shape, shape, by_row, state_shape)]
    given = [guarded.copy(problem.dy), guarded.copy(problem.d_final)]
    backward(*shape, *addresses(*inputs[:-1], checkpoints, *given, *gradients), 2)

    guarded.assert_untouched()
    for output in (y, final_state, checkpoints, *gradients):
        assert output.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 70), (1, 64, 64), (3, 33, 129)], ids=str)
def test_wkv4_writes_all_of_its_outputs_and_nothing_else(wkv4_problem, shape):
    batch, n_tokens, n_embd = shape
    problem = wkv4_problem(batch, n_tokens, n_embd)
    guarded = Guarded()
    inputs = [guarded.copy(x) for x in problem.inputs]
    state_shape = (batch, 3, n_embd)
    y, final_state = guarded.output(*shape), guarded.output(*state_shape)
    checkpoints = guarded.output(batch, -(-n_tokens // wkv4_cpp.CHECKPOINT_TOKENS), 3, n_embd)
    library = wkv4_cpp.load()

    library.rwkv_wkv4_forward(*shape, *addresses(*inputs, y, final_state, checkpoints), 2)
    by_row = (batch, n_embd)
    gradients = [guarded.output(*size) for size in (by_row, by_row, shape, shape, state_shape)]
    given = [guarded.copy(problem.dy), guarded.copy(torch.zeros(state_shape))]
    library.rwkv_wkv4_backward(*shape, *addresses(*inputs[:-1], checkpoints, *given, *gradients), 2)

    guarded.assert_untouched()
    for output in (y, final_state, checkpoints, *gradients):
        assert output.isfinite().all()
