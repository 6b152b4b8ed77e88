"""A Lightning run on CPU that saves with and without DeepSpeed; started by the tests.

    python lightning_writer.py WEIGHTS.pth OUT

``OUT/plain.ckpt`` is a file, ``OUT/zero2.ckpt`` and ``OUT/zero3.ckpt`` are folders; beside each,
``NAME.truth.pth`` has the weights of the running module, without the prefix ``model.``.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import lightning
import numpy
import torch
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed_writer import Tree
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy


class CpuDeepSpeed(DeepSpeedStrategy):
    """Lightning's strategy without its refusal of CPUs."""

    @property
    def root_device(self):
        return torch.device("cpu", 0)

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Run(lightning.LightningModule):
    """A module as people write it: settings saved, the model below ``model.``."""

    def __init__(self, weights, args, path, score):
        super().__init__()
        self.save_hyperparameters()
        self.model = Tree(torch.load(weights, weights_only=True))

    def training_step(self, batch, _index):
        loss = self.model(batch.mean())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)]


def main():
    weights, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in ("plain", "zero2", "zero3"):
        stage = 0 if name == "plain" else int(name[-1])
        strategy = CpuDeepSpeed(stage=stage, process_group_backend="gloo") if stage else "auto"
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            max_steps=3,
            logger=False,
            callbacks=[ModelCheckpoint(dirpath=out / "kept" / name, monitor="loss")],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        run = Run(weights, Namespace(lr=0.01, data=[1, 2]), Path("some/path"), numpy.float64(0.5))
        trainer.fit(run, torch.utils.data.DataLoader(torch.full((3, 2), 0.3)))
        trainer.save_checkpoint(out / f"{name}.ckpt")
        torch.save(
            {
                name: (safe_get_full_fp32_param(p) if stage else p).detach().clone()
                for name, p in run.model.named_parameters()
            },
            out / f"{name}.truth.pth",
        )


if __name__ == "__main__":
    main()
