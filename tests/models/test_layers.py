import pytest
import torch
from torch import nn

from rwkv_train.models.layers import (
    HeadNorm,
    gain_of_shape,
    last_token,
    layer_ratios,
    relu_squared,
    shift_tokens,
)
from rwkv_train.ops.context import PLAIN, packed_context


def test_each_token_sees_the_one_before_it_and_the_first_sees_the_state():
    x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    shifted = shift_tokens(x, torch.tensor([[7.0], [8.0]]), PLAIN)
    assert shifted.squeeze(-1).tolist() == [[7.0, 1.0, 2.0], [8.0, 4.0, 5.0]]


def test_a_state_of_another_dtype_does_not_change_the_activations():
    x = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    assert shift_tokens(x, torch.zeros(1, 3), PLAIN).dtype == torch.bfloat16


def test_in_a_packed_row_the_first_token_of_a_sequence_sees_its_own_state():
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    context = packed_context(torch.tensor([0, 0, 3, 3, 4, 4]))
    before = torch.tensor([[5.0], [6.0], [7.0], [8.0], [9.0]])
    assert shift_tokens(x, before, context).flatten().tolist() == [6, 1, 2, 8]
    assert last_token(x, before, context).flatten().tolist() == [5, 3, 7, 4, 9]


def test_the_last_token_does_not_keep_the_others_in_memory():
    x = torch.randn(2, 100, 3)
    last = last_token(x, torch.zeros(2, 3), PLAIN)
    assert last.tolist() == x[:, -1].tolist()
    assert last.untyped_storage().nbytes() == 2 * 3 * 4


def test_head_norm_is_group_norm_with_a_group_for_each_head():
    generator = torch.Generator().manual_seed(0)
    published = nn.GroupNorm(4, 24, eps=64e-5)
    norm = HeadNorm(24, 64e-5)
    with torch.no_grad():
        for name, parameter in published.named_parameters():
            parameter.copy_(torch.randn(24, generator=generator))
            norm.get_parameter(name).copy_(parameter)
    y = 0.05 * torch.randn(2, 5, 4, 6, generator=generator)  # small, so that the epsilon counts

    expected = published(y.reshape(10, 24)).view(2, 5, 24)

    torch.testing.assert_close(norm(y), expected)


def test_relu_squared_and_its_gradient():
    x = torch.tensor([-2.0, -0.0, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert relu_squared(x).tolist() == [0, 0, 0, 0.25, 9]
    assert torch.autograd.gradcheck(relu_squared, x)


def test_depth_runs_from_zero_to_one_and_from_one_to_almost_zero():
    assert [layer_ratios(layer, 4) for layer in range(4)] == [(0, 1), (1 / 3, 0.75), (2 / 3, 0.5), (1, 0.25)]


def test_a_single_layer_is_the_first():
    assert layer_ratios(0, 1) == (0.0, 1.0)


@pytest.mark.parametrize(("rows", "columns", "gain"), [(400, 100, 2.0), (100, 400, 1.0), (7, 7, 1.0)])
def test_only_tall_matrices_have_a_larger_gain(rows, columns, gain):
    assert gain_of_shape(rows, columns) == gain
