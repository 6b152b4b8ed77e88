import pytest
from lightning.pytorch.utilities import rank_zero_only

from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import ConfigError
from rwkv_train.training.strategy import make_trainer

TWO_NODES = TrainerConfig(
    out_dir="run",
    max_steps=1,
    num_nodes=2,
    devices=2,
    accelerator="cpu",
    global_batch_size=8,
    micro_batch_size=2,
)
RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "4"}


def as_process(monkeypatch, rank_at_import, variables):
    """Stand in for a process that a launcher has started; Lightning reads the rank when it is imported."""
    for name, value in (RENDEZVOUS | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", rank_at_import)


@pytest.mark.parametrize("local", ["0", "1"])
def test_a_process_that_would_take_another_ones_place_is_refused(monkeypatch, local):
    as_process(monkeypatch, int(local), {"NODE_RANK": "1", "LOCAL_RANK": local, "WORLD_SIZE": "4"})
    with pytest.raises(ConfigError, match="start it with torchrun"):
        make_trainer(TWO_NODES, 1, [], [])


def test_a_process_of_torchrun_has_its_number(monkeypatch):
    as_process(monkeypatch, 3, TORCHRUN)
    assert make_trainer(TWO_NODES, 1, [], []).global_rank == 3
