"""FSDP2: every parameter is cut into one part a process and gathered for each use, block by block."""

import warnings

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.training.engine import Engine


def make_fsdp_strategy(settings: TrainerConfig) -> ModelParallelStrategy:
    """Build Lightning's strategy, with all processes in one group."""
    # Blocks return views (a state is the last of their inputs). Nothing writes into them, which it warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    return ModelParallelStrategy(data_parallel_size=settings.world_size, tensor_parallel_size=1)


class FsdpEngine(Engine):
    """Parameters, gradients and moments are DTensors, each process holding its rows."""

    def shard(self, trainer: Trainer) -> None:
        """Cut each block's parameters, and those outside of blocks, over the processes."""
        strategy = trainer.strategy
        assert isinstance(strategy, ModelParallelStrategy)
        mesh = strategy.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.config.trainer.precision == "bf16-params" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the recurrence's state is float32 in every precision
        )
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)

    def rest(self) -> None:
        """Let go of what a forward without backward has gathered, so that parameters are DTensors again."""
        model = self.model
        assert isinstance(model, FSDPModule)
        model.reshard()

    def full(self, tensor: Tensor) -> Tensor:
        """Gather a tensor from all processes."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def place(self, value: Tensor, parameter: Tensor) -> Tensor:
        """Keep this process' part of a tensor that every process has read."""
        assert isinstance(parameter, DTensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
