"""One process of a DeepSpeed run on CPU that saves a checkpoint of every kind; started by the tests.

    python deepspeed_writer.py WEIGHTS.pth OUT RANK WORLD_SIZE

For each kind, ``OUT/KIND`` is what DeepSpeed saved after three steps, ``OUT/KIND.truth.pth`` the float32
weights as the running engine gathers them (under ZeRO), ``OUT/KIND.converted.pth`` those of its own converter.
"""

import os
import shutil
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

N_STEPS = 3
FROZEN = {"ln_out.bias", "frozen"}


class Tree(nn.Module):
    """Parameters under names with dots; each module uses its own, as ZeRO 3 wants it."""

    def __init__(self, tensors):
        super().__init__()
        below = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                below.setdefault(first, {})[rest] = tensor
            else:
                self.register_parameter(first, nn.Parameter(tensor.clone()))
        for name, part in below.items():
            self.add_module(name, Tree(part))

    def forward(self, x):
        own = [(p.float() - x).square().sum() for p in self.parameters(recurse=False)]
        return sum(own + [child(x) for child in self.children()])


class Odd(Tree):
    """What models seldom have: one weight under two names, a buffer, a parameter smaller than the world."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        shapes = {
            "emb.weight": (5, 3),
            "head.weight": (5, 3),
            "frozen": (3, 5),
            "one": (1,),
            "last": (1, 1, 11),
        }
        super().__init__({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
        self.head.weight = self.emb.weight
        self.register_buffer("buffer", torch.arange(4.0))


def save(out, kind, module, stage, *, is_bf16=False, zero=None):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in FROZEN)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.squeeze().dim() < 2], "lr": 0.02},
        {"params": [p for p in trained if p.squeeze().dim() >= 2], "lr": 0.01},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": is_bf16},
    }
    engine = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(groups), config=config)[0]
    for _ in range(N_STEPS):
        engine.backward(engine(torch.tensor(0.3)))
        engine.step()
    engine.save_checkpoint(str(out / kind), tag="some-tag")
    if not stage:
        return
    truth = {
        name: safe_get_full_fp32_param(parameter).clone()
        for name, parameter in engine.module.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    if torch.distributed.get_rank() == 0:
        torch.save(truth, out / f"{kind}.truth.pth")
        torch.save(get_fp32_state_dict_from_zero_checkpoint(str(out / kind)), out / f"{kind}.converted.pth")


def forget_places(folder, copy):
    """As DeepSpeed wrote before it stored where the pieces of parameters lie."""
    shutil.copytree(folder, copy)
    for path in copy.glob("*/*_optim_states.pt"):
        content = torch.load(path, weights_only=False)
        del content["optimizer_state_dict"]["param_slice_mappings"]
        torch.save(content, path)


def main():
    weights, out, rank, world_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled, for a minute
    deepspeed.init_distributed(
        dist_backend="gloo",
        init_method=f"file://{out}/rendezvous",
        rank=rank,
        world_size=world_size,
        auto_mpi_discovery=False,
    )
    for stage in range(4):
        for dtype in ("fp32", "bf16"):
            module = Tree(torch.load(weights, weights_only=True))
            save(out, f"zero{stage}-{dtype}", module, stage, is_bf16=dtype == "bf16")
    for stage in (1, 2, 3):
        zero = {"sub_group_size": 4} if stage == 3 else {"round_robin_gradients": True}
        save(out, f"odd{stage}", Odd(), stage, is_bf16=True, zero=zero)
    if rank == 0:
        forget_places(out / "zero2-fp32", out / "old2-fp32")


if __name__ == "__main__":
    main()
