"""Losses and the penalty of L2Wrap, and their gradients, against the published definition in float64."""

import pytest
import torch

from rwkv_train.models.lm import Head

B, T, C, V = 2, 5, 8, 11
FACTOR = 0.1  # the published 1e-4 would hide behind the cross entropy's gradient


def make_head(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    head = Head(C, V).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, C, generator=generator))
    x = torch.randn(B, T, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return head, x, torch.randint(0, V, (B, T), generator=generator)


def published_gradients(x, weight, targets, factor):
    """Gradients of x and weight by hand: softmax less one-hot, and at the largest logit factor times it."""
    logits = x @ weight.T
    exps = (logits - logits.amax(-1, keepdim=True)).exp()
    d_logits = exps / exps.sum(-1, keepdim=True)
    for b in range(B):
        for t in range(T):
            d_logits[b, t, targets[b, t]] -= 1
            d_logits[b, t, logits[b, t].argmax()] += factor * logits[b, t].max()
    d_logits /= B * T
    return d_logits @ weight, torch.einsum("btv,btc->vc", d_logits, x)


@pytest.mark.parametrize("factor", [0.0, 1e-4, FACTOR])
def test_the_gradient_at_the_largest_logit_is_the_published_one(factor):
    head, x, targets = make_head()
    losses, penalties = head(x, targets, with_penalty=True)
    (losses + factor * penalties).mean().backward()

    d_x, d_weight = published_gradients(x.detach(), head.weight.detach(), targets, factor)
    torch.testing.assert_close(x.grad, d_x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(head.weight.grad, d_weight, rtol=1e-12, atol=1e-14)


def test_the_gradient_agrees_with_finite_differences():
    head, x, targets = make_head()
    targets[0, 2] = -100
    assert torch.autograd.gradcheck(lambda x: head(x, targets, with_penalty=True), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_penalties_are_half_the_squared_largest_logit_in_float32(dtype):
    head, x, targets = make_head(dtype)
    _, penalties = head(x, targets, with_penalty=True)
    logits, _ = head(x)
    assert penalties.dtype == torch.float32
    torch.testing.assert_close(penalties.double(), logits.double().amax(-1) ** 2 / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_penalty_changes_no_loss(dtype):
    head, x, targets = make_head(dtype)
    targets[1, 0] = -100
    plain, none = head(x, targets)
    assert none is None
    assert torch.equal(head(x, targets, with_penalty=True)[0], plain)


def test_a_masked_target_has_neither_loss_nor_penalty_nor_gradient():
    head, x, targets = make_head()
    targets[0, 3] = -100
    losses, penalties = head(x, targets, with_penalty=True)
    (losses + FACTOR * penalties).sum().backward()

    assert losses[0, 3] == penalties[0, 3] == 0
    assert (penalties != 0).sum() == B * T - 1
    assert not x.grad[0, 3].any()
    assert x.grad.any(-1).sum() == B * T - 1


def test_of_equal_largest_logits_one_is_pulled():
    head, x, targets = make_head()
    with torch.no_grad():
        head.weight.copy_(head.weight[:1].expand(V, C))
    logits = (x @ head.weight.T).detach()
    _, penalties = head(x, targets, with_penalty=True)
    penalties.sum().backward()
    # Each row's gradient with respect to x is (largest logit) * (one row of the weight), not V times it.
    torch.testing.assert_close(x.grad, logits[..., :1] * head.weight[0].detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_are_computed_again_give_the_same_bits_from_less_memory(dtype):
    found, kept = [], []
    for recompute in (False, True):
        head, x, targets = make_head(dtype)
        head.recompute_logits = recompute
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            losses, penalties = head(x, targets, with_penalty=True)
        (losses + FACTOR * penalties).mean().backward()
        found.append((losses, penalties, x.grad, head.weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert kept[0] - kept[1] == B * T * V


def test_the_penalty_compiles_as_part_of_one_graph():
    head, x, targets = make_head(torch.float32)
    expected = [tensor.detach() for tensor in head(x, targets, with_penalty=True)]
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    losses, penalties = compiled(x, targets, with_penalty=True)
    (losses + FACTOR * penalties).mean().backward()
    torch.testing.assert_close([losses.detach(), penalties.detach()], expected)
    d_x, _ = published_gradients(x.detach().double(), head.weight.detach().double(), targets, FACTOR)
    torch.testing.assert_close(x.grad.double(), d_x, rtol=1e-4, atol=1e-6)
