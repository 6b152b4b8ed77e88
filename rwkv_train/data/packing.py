"""Where a sequence of its own begins in a micro-batch whose documents must not see each other."""

import torch
from torch import Tensor


def cut_at_documents(tokens: Tensor, end_of_document: int) -> Tensor:
    """Return where sequences begin once the samples of a micro-batch lie one after another in one row.

    One begins with each sample, and with each end token that is read: so a document is read as ``[end token, its
    tokens]`` and predicts its tokens and then its end, as in evaluation. A document that a sample cuts goes on with
    a fresh state.

    Args:
        tokens: the samples' inputs, ``[B, T]`` int64.
        end_of_document: the token after each document.

    Returns:
        ``cu_seqlens``, ``[S + 1]`` int64: sequence s has the positions ``cu_seqlens[s]`` to ``cu_seqlens[s + 1] - 1``.
        Empty sequences at the end make S a power of two, so that a compiled model meets few different sizes.
    """
    is_first = tokens == end_of_document
    is_first[:, 0] = True
    starts = is_first.flatten().nonzero().flatten()
    n_sequences = 1 << (len(starts) - 1).bit_length()
    cu_seqlens = torch.full((n_sequences + 1,), tokens.numel(), dtype=torch.int64)
    cu_seqlens[: len(starts)] = starts
    return cu_seqlens
