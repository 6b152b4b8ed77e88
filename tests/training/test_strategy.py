"""From settings to Lightning's Trainer."""

import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from rwkv_train.training.strategy import make_trainer


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", SingleDeviceStrategy),
        ("ddp", DDPStrategy),
        ("fsdp2", ModelParallelStrategy),
        ("deepspeed_2", DeepSpeedStrategy),
    ],
)
def test_a_strategy_is_lightnings_of_that_name(settings, name, kind):
    config = settings({"trainer.strategy": name})
    assert isinstance(make_trainer(config, 1, [], []).strategy, kind)


def test_several_processes_without_a_strategy_are_ddp(settings, monkeypatch):
    # As torchrun starts the last of four.
    world = {"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    config = settings({"trainer.devices": 2, "trainer.num_nodes": 2, "trainer.micro_batch_size": 2})
    trainer = make_trainer(config, 1, [], [])
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.global_rank == 3
