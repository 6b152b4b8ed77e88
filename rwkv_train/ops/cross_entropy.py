"""The loss of a linear layer over a large vocabulary, without holding all of its logits in float32, or at all.

Logits are made and used for some rows at a time. Up to ``KEPT_BYTES`` of them are kept for the backward in their own
dtype, so that the product which makes them is computed once; beyond, or where the caller wants it, each is computed
again: a third more arithmetic than the three products of forward and backward, for no memory. Which of the two it is
depends on sizes alone, and both give the same bits.

Others compute the gradient of the logits in the forward already, for an upstream gradient that they take to be the
same for every token (Liger Kernel, PyTorch's own ``linear_cross_entropy``). Here it may differ from token to token,
and arrives in the backward; there is L2Wrap; PyTorch's exists from 2.13 on and is not compiled; Liger needs Triton
and a GPU, while a run on a CPU has to compute the same.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rwkv_train.ops.registration import without_autocast

CHUNK_LOGITS = 1 << 28
"""Logits that one matrix product makes: 4,096 rows of 65,536. With fewer, adding to the gradient of the weight once
a chunk, of which each element is read and written, would take a larger part of the time of the products."""
PART_LOGITS = 1 << 25
"""Logits that a softmax is computed of at once in float32: 512 rows of 65,536, some for each processor of a GPU."""
CPU_PART_LOGITS = 1 << 22
"""Likewise on a CPU: 16 MiB, which it has used before, and not pages that the system has to clear first."""
KEPT_BYTES = 1 << 32
"""Most memory that logits are kept in for a backward: 32,768 rows of 65,536 in bfloat16."""

_LIBRARY = torch.library.Library("rwkv_train", "FRAGMENT")  # type: ignore[no-untyped-call]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    with_penalty: bool = False,
    keep_logits: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each target under the logits ``x @ weight.T``.

    The products are computed in the dtype of ``x``, or of autocast; softmax, losses and the sum that the gradient of
    ``weight`` is in float32, or in float64 where ``x`` is. That gradient is rounded once, to the dtype of ``weight``.
    There is no second derivative. Nothing waits for the device.

    The penalty of a token with the largest logit m is m^2 / 2, whose gradient is m at that logit (one of them, where
    several are equal) and 0 elsewhere. Published is only this gradient, times factor / (B T): that of
    ``factor * penalties.mean()``.

    Args:
        x: ``[B, T, C]``.
        weight: ``[V, C]``, in the dtype of ``x``; of any floating dtype under autocast.
        targets: ids from 0 to V - 1, or ``ignore_index``, ``[B, T]`` int64.
        ignore_index: stands for a target that is not to be predicted: loss, penalty and gradient 0.
        with_penalty: also return the penalties of L2Wrap.
        keep_logits: whether up to ``KEPT_BYTES`` of logits may be kept for the backward.

    Returns:
        Losses in nats and penalties, or ``None``, both ``[B, T]`` in float32 (float64 where ``x`` is).

    Raises:
        ValueError: shapes or dtypes disagree.

    Source:
        RWKV-LM, ``RWKV-v4neo/src/model.py`` (L2Wrap).
    """
    if x.shape[:-1] != targets.shape or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, targets))
        raise ValueError(f"x, weight, targets must be [B, T, C], [V, C], [B, T], got {shapes}")
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
    elif weight.dtype != x.dtype:
        raise ValueError(f"x ({x.dtype}) and weight ({weight.dtype}) must have one dtype")
    rows = x.flatten(0, -2)  # [R, C]
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    fits = rows.shape[0] * weight.shape[0] * x.element_size() <= KEPT_BYTES
    losses, penalties, _, _ = torch.ops.rwkv_train.linear_cross_entropy(
        rows, weight, targets.flatten(), ignore_index, with_penalty, keep_logits and fits and wants_gradient
    )
    return losses.view_as(targets), penalties.view_as(targets) if with_penalty else None


def working_bytes(
    n_rows: int,
    n_embd: int,
    vocab_size: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    *,
    weight_learns: bool = True,
) -> int:
    """Return the memory that a backward needs for a while, besides what the forward kept for it.

    It is that of a chunk's gradient, of the softmax of a part, of both gradients and of a weight that autocast casts.
    That is on a GPU; a CPU needs less, or more where the products are narrower than float32: their factors in float32.

    Args:
        n_rows: tokens (R).
        n_embd: width (C).
        vocab_size: rows of the weight (V).
        dtype: dtype of the products.
        weight_dtype: dtype of the weight.
        weight_learns: whether it gets a gradient.
    """
    wide = _wide(dtype)
    chunk = min(n_rows, _rows_in(CHUNK_LOGITS, vocab_size)) * vocab_size * dtype.itemsize
    part = min(n_rows, _rows_in(PART_LOGITS, vocab_size)) * vocab_size * wide.itemsize
    softmax = part if dtype == wide else 2 * part  # logits are widened before it
    cast = dtype.itemsize if weight_dtype != dtype else 0
    rounded = weight_dtype.itemsize if weight_learns and weight_dtype != wide else 0
    gradient = wide.itemsize if weight_learns else 0
    gradients = vocab_size * n_embd * (gradient + cast) + n_rows * n_embd * dtype.itemsize
    return gradients + max(chunk + softmax, vocab_size * n_embd * rounded)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows_in(n_logits: int, vocab_size: int) -> int:
    return max(1, n_logits // vocab_size)


def _slices(n_rows: int, n_logits: int, vocab_size: int) -> Iterator[slice]:
    """Cut rows into slices of one size, but for the last, that have ``n_logits`` logits at most, or one row."""
    n_slices = -(-n_rows // _rows_in(n_logits, vocab_size))
    for i in range(n_slices):
        size = -(-n_rows // n_slices)
        yield slice(i * size, min((i + 1) * size, n_rows))


def _forward_shapes(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_penalty: bool, keep_logits: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses ``[R]``, penalties ``[R]``, ids of the largest logits ``[R]``, logits ``[R, V]``; else empty."""
    n_rows, vocab_size = x.shape[0], weight.shape[0]
    n_penalties = n_rows if with_penalty else 0
    return (
        x.new_empty(n_rows, dtype=_wide(x.dtype)),
        x.new_empty(n_penalties, dtype=_wide(x.dtype)),
        targets.new_empty(n_penalties),
        x.new_empty((n_rows, vocab_size) if keep_logits else (0, vocab_size)),
    )


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_penalty: bool, keep_logits: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _forward_shapes(x, weight, targets, ignore_index, with_penalty, keep_logits)
    losses, penalties, largest_ids, kept = outputs
    columns = weight.to(x.dtype).T  # [C, V]
    n_at_once = CPU_PART_LOGITS if x.is_cpu else PART_LOGITS
    is_ignored = targets == ignore_index
    index = targets.masked_fill(is_ignored, 0)
    for rows in _slices(x.shape[0], CHUNK_LOGITS, weight.shape[0]):
        logits = torch.mm(x[rows], columns, out=kept[rows] if keep_logits else None)
        for part in _slices(logits.shape[0], n_at_once, weight.shape[0]):
            losses[rows][part] = _losses(logits[part], index[rows][part], losses.dtype)
        if with_penalty:
            largest_ids[rows] = logits.argmax(dim=1)
            penalties[rows] = _at(logits, largest_ids[rows]).to(penalties.dtype).square() / 2
        del logits  # before there are the next
    losses.masked_fill_(is_ignored, 0)
    penalties.masked_fill_(is_ignored[: penalties.shape[0]], 0)
    return outputs


def _losses(logits: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return -_at(torch.log_softmax(logits, dim=1, dtype=dtype), index)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Return one value of each row."""
    return values.gather(1, index.unsqueeze(1)).squeeze(1)


def _backward_shapes(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    largest_ids: Tensor,
    kept: Tensor,
    d_losses: Tensor,
    d_penalties: Tensor,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x ``[R, C]`` and of the weight ``[V, C]``; empty where not wanted."""
    return x.new_empty(x.shape if wants_x else (0,)), weight.new_empty(weight.shape if wants_weight else (0,))


def _backward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    largest_ids: Tensor,
    kept: Tensor,
    d_losses: Tensor,
    d_penalties: Tensor,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    matrix = weight.to(x.dtype)
    d_x = x.new_empty(x.shape if wants_x else (0,))
    d_weight = x.new_zeros(weight.shape if wants_weight else (0,), dtype=_wide(x.dtype))
    n_at_once = CPU_PART_LOGITS if x.is_cpu else PART_LOGITS
    is_ignored = targets == ignore_index
    index = targets.masked_fill(is_ignored, 0)
    d_losses = d_losses.masked_fill(is_ignored, 0)
    d_penalties = d_penalties.masked_fill(is_ignored[: d_penalties.shape[0]], 0)
    for rows in _slices(x.shape[0], CHUNK_LOGITS, weight.shape[0]):
        if kept.shape[0]:
            logits = kept[rows]
            d_logits = torch.empty_like(logits)  # autograd may want the kept ones once more
        else:
            logits = d_logits = torch.mm(x[rows], matrix.T)
        for part in _slices(logits.shape[0], n_at_once, weight.shape[0]):
            d_logits[part] = _d_logits(
                logits[part],
                index[rows][part],
                d_losses[rows][part],
                largest_ids[rows][part],
                d_penalties[rows][part],
            )
        if wants_x:
            torch.mm(d_logits, matrix, out=d_x[rows])
        if wants_weight:
            _add_product(d_weight, d_logits, x[rows])
        del logits, d_logits  # before there are the next
    return d_x, d_weight.to(weight.dtype)


def _d_logits(
    logits: Tensor, index: Tensor, d_losses: Tensor, largest_ids: Tensor, d_penalties: Tensor
) -> Tensor:
    """Return the gradient of the logits in the dtype of ``d_losses``; without penalties the last two are empty."""
    d_logits = torch.softmax(logits, dim=1, dtype=d_losses.dtype).mul_(d_losses.unsqueeze(1))
    d_logits.scatter_add_(1, index.unsqueeze(1), -d_losses.unsqueeze(1))
    if d_penalties.shape[0]:
        d_largest = _at(logits, largest_ids).to(d_penalties.dtype) * d_penalties
        d_logits.scatter_add_(1, largest_ids.unsqueeze(1), d_largest.unsqueeze(1))
    return d_logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a.T @ b`` to ``total``, summed in the dtype of that."""
    if a.dtype == total.dtype:
        total.addmm_(a.T, b)
    elif a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 0):
        torch.addmm(total, a.T, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.T.to(total.dtype), b.to(total.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, targets, ctx.ignore_index, _with_penalty, _keep = inputs
    _losses, _penalties, largest_ids, kept = output
    ctx.save_for_backward(x, weight, targets, largest_ids, kept)
    ctx.set_materialize_grads(False)  # zeros for the kept logits would be large and unused


def _differentiate(
    ctx: Any, d_losses: Tensor | None, d_penalties: Tensor | None, *_: None
) -> tuple[Any, ...]:
    x, weight, targets, largest_ids, kept = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    if d_losses is None:
        d_losses = x.new_zeros(targets.shape, dtype=_wide(x.dtype))
    if d_penalties is None:
        d_penalties = d_losses.new_zeros(largest_ids.shape)
    d_x, d_weight = torch.ops.rwkv_train.linear_cross_entropy_backward(
        x, weight, targets, ctx.ignore_index, largest_ids, kept, d_losses, d_penalties, wants_x, wants_weight
    )
    return d_x if wants_x else None, d_weight if wants_weight else None, None, None, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
    raise NotImplementedError("linear_cross_entropy has no second derivative")


def _register() -> None:
    operators: dict[str, tuple[str, Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]] = {
        "linear_cross_entropy": (
            "(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool with_penalty, bool keep_logits)"
            " -> (Tensor, Tensor, Tensor, Tensor)",
            _forward,
            _forward_shapes,
        ),
        "linear_cross_entropy_backward": (
            "(Tensor x, Tensor weight, Tensor targets, int ignore_index, Tensor largest_ids, Tensor kept,"
            " Tensor d_losses, Tensor d_penalties, bool wants_x, bool wants_weight) -> (Tensor, Tensor)",
            _backward,
            _backward_shapes,
        ),
    }
    for name, (schema, function, shapes) in operators.items():
        _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, without_autocast(function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"rwkv_train::{name}", shapes, lib=_LIBRARY)
    name = "rwkv_train::linear_cross_entropy"
    torch.library.register_autograd(name, _differentiate, setup_context=_save, lib=_LIBRARY)
    torch.library.register_autograd(f"{name}_backward", _refuse, lib=_LIBRARY)


_register()
