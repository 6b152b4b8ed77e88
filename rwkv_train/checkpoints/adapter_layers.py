"""What an adapter makes of the weight of one linear layer."""

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """LoRA, or DoRA where there is a magnitude.

    Source:
        Hu et al. 2021, "LoRA", arXiv:2106.09685; Liu et al. 2024, "DoRA", arXiv:2402.09353; Kalajdzievski 2023,
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732.
    """

    a: Tensor
    """``[r, in]``."""
    b: Tensor
    """``[out, r]``."""
    scale: float
    """alpha / r, or alpha / sqrt(r)."""
    magnitude: Tensor | None = None
    """Lengths of the rows of the result, ``[out]``; ``None``: whatever they come to."""

    def fits(self, shape: torch.Size) -> bool:
        """Tell whether a weight of this shape, ``[out, in]``, can have it."""
        return shape == (self.b.shape[0], self.a.shape[1])

    def applied_to(self, weight: Tensor) -> Tensor:
        """Return ``W + scale B A`` in float64, its rows brought to the length of the magnitude where there is one."""
        merged: Tensor = torch.addmm(weight.double(), self.b.double(), self.a.double(), alpha=self.scale)
        if self.magnitude is None:
            return merged
        lengths: Tensor = torch.linalg.vector_norm(merged, dim=1)
        return merged * (self.magnitude.double() / lengths)[:, None]


class BlockSums(NamedTuple):
    """MiSS: the input's blocks of r channels are added up, and the sum goes through one matrix.

    Source:
        Kang et al. 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
        arXiv:2409.15371.
    """

    block: Tensor
    """``[r, out]``."""

    def fits(self, shape: torch.Size) -> bool:
        """Tell whether a weight of this shape, ``[out, in]``, can have it."""
        return len(shape) == 2 and shape[0] == self.block.shape[1] and shape[1] >= self.block.shape[0]

    def applied_to(self, weight: Tensor) -> Tensor:
        """Return ``W`` in float64 with the row ``i mod r`` of the block added to its column ``i``, for every ``i``."""
        channels = torch.arange(weight.shape[1]) % self.block.shape[0]
        return weight.double() + self.block.double()[channels].T


LayerAdapter = LowRank | BlockSums
