"""The real command, but with a loss that is not a number for the samples of some batches.

Usage: ``NAN_BATCHES=3,5 python nan_samples.py pretrain ...``; batches are counted from 0 in the order of the data, so
that another step on the same data fails again and the same step on other data does not.
"""

import math
import os
from typing import Any

from torch import Tensor

from rwkv_train.commands import main
from rwkv_train.training.module import TrainingModule

BATCHES = {int(number) for number in os.environ["NAN_BATCHES"].split(",")}
honest_step = TrainingModule.training_step


def training_step(self: TrainingModule, batch: Any, batch_idx: int) -> Tensor:
    share = honest_step(self, batch, batch_idx)
    is_bad = batch.first_sample // self.config.trainer.global_batch_size in BATCHES
    return share * math.nan if is_bad else share


if __name__ == "__main__":
    TrainingModule.training_step = training_step  # type: ignore[method-assign]
    main()
