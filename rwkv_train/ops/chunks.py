"""What the chunked recurrences in plain tensor operations share: cutting tokens into chunks, and sums inside them.

Chunks are ``[M, C, N]`` with ``M = n_chunks * B * H`` (chunks slowest, then sequences, then heads) and C tokens in
each. Sums are over the tokens of a block, dimension -2; those of log decays are short, and never differences of
longer ones.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SEGMENT_TOKENS = 1024
"""Tokens worked on at once; bounds the memory of what is only needed meanwhile."""

STEP_TOKENS = 2
"""Up to this many tokens the plain loop is faster than a chunk."""


def chunk_tokens(device_type: str) -> int:
    """Return the tokens in one chunk (C), a power of two: more of them make fewer, larger steps."""
    return 16 if device_type == "cpu" else 32


def segments(n_tokens: int) -> list[slice]:
    """Return the segments of a sequence, first to last."""
    return [slice(t, min(t + SEGMENT_TOKENS, n_tokens)) for t in range(0, n_tokens, SEGMENT_TOKENS)]


def cut(x: Tensor, n_chunk: int, dtype: torch.dtype) -> Tensor:
    """Bring ``[B, T, H, N]`` to ``[M, C, N]``; zeros beyond the end change neither outputs nor the state."""
    batch, n_tokens, n_head, head_size = x.shape
    padded = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -n_tokens % n_chunk))
    chunks = padded.view(batch, -1, n_chunk, n_head, head_size).permute(1, 0, 3, 2, 4)
    return chunks.reshape(-1, n_chunk, head_size)


def join(chunks: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`cut`, to the shape and dtype of ``like``."""
    batch, n_tokens, n_head, head_size = like.shape
    tokens = chunks.view(-1, batch, n_head, chunks.shape[1], head_size).permute(1, 0, 3, 2, 4)
    return tokens.reshape(batch, -1, n_head, head_size)[:, :n_tokens].to(like.dtype)


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Cut ``[M, C, N]`` into neighbouring blocks: the earlier and the later, ``[M, C / 2 half, half, N]`` each."""
    blocks = torch.unflatten(x, 1, (-1, 2, half))
    return blocks[:, :, 0], blocks[:, :, 1]


def sum_upto(x: Tensor) -> Tensor:
    """Sum the tokens up to each one, with it."""
    return x.cumsum(-2)


def sum_before(x: Tensor) -> Tensor:
    """Sum the tokens before each one."""
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def sum_from(x: Tensor) -> Tensor:
    """Sum the tokens from each one on, with it."""
    return x.flip(-2).cumsum(-2).flip(-2)


def sum_after(x: Tensor) -> Tensor:
    """Sum the tokens after each one."""
    return F.pad(sum_from(x[..., 1:, :]), (0, 0, 0, 1))
