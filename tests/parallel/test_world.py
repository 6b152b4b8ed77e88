"""What the environment says of this process, whoever wrote it; expected values as torchrun and srun document them."""

import pytest

from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import ConfigError
from rwkv_train.parallel.launch import needs_launch
from rwkv_train.parallel.processes import Processes
from rwkv_train.parallel.world import read_world, require_numbers, require_size, slurm_as_torchrun
from rwkv_train.training.code_version import code_version

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def settings(**changes):
    return TrainerConfig(out_dir="x", max_steps=1, global_batch_size=64, micro_batch_size=1, **changes)


def test_torchrun_says_who_and_where():
    world = read_world(TORCHRUN)
    assert (world.rank, world.local_rank, world.world_size, world.attempt) == (5, 1, 8, 2)
    assert (world.address, world.port) == ("node7", 29500)
    assert not world.is_host


def test_rank_0_is_the_host_unless_torchrun_is():
    one = TORCHRUN | {"RANK": "0"}
    assert not read_world(one).is_host
    del one["TORCHELASTIC_USE_AGENT_STORE"]
    assert read_world(one).is_host


def test_srun_looks_like_torchrun():
    world = read_world(SRUN)
    assert (world.rank, world.local_rank, world.world_size) == (5, 1, 8)
    assert (world.address, world.port) == ("gpu07", 15000 + 4567)
    assert slurm_as_torchrun(SRUN)["LOCAL_WORLD_SIZE"] == "4"


def test_a_batch_script_of_several_tasks_is_one_process():
    assert read_world({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}) is None


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "0"}, "not WORLD_SIZE, LOCAL_RANK, MASTER_PORT, MASTER_ADDR"),
        (TORCHRUN | {"RANK": "one"}, "RANK is 'one', it must be a number"),
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "²"}, "TORCHELASTIC_RESTART_COUNT is '²', it must be"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}, "SLURM_PROCID is not in its environment"),
    ],
    ids=["incomplete", "no number", "no ASCII", "srun"],
)
def test_half_an_environment_is_refused(environment, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_world(environment)


def test_another_number_of_processes_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"devices \(2\) x trainer.num_nodes \(2\) is 4 .* started 8"):
        require_size(settings(devices=2, num_nodes=2), read_world(TORCHRUN))
    with pytest.raises(ConfigError, match="is 2 processes but this one was started alone"):
        require_size(settings(devices=2), None)


@pytest.mark.parametrize(
    ("changes", "environment", "expected"),
    [
        ({}, {}, False),
        ({"devices": 2}, {}, True),
        ({"devices": 8}, TORCHRUN, False),
        ({"devices": 4, "num_nodes": 2}, SRUN, False),
    ],
    ids=["one", "two", "torchrun", "srun"],
)
def test_only_several_processes_without_a_launcher_are_launched(changes, environment, expected):
    assert needs_launch(settings(**changes), environment) is expected


def test_several_machines_need_a_launcher():
    with pytest.raises(ConfigError, match=r"num_nodes is 2.*torchrun"):
        needs_launch(settings(num_nodes=2), {})


def test_alone_nothing_is_exchanged():
    alone = Processes()
    assert alone.is_first
    assert alone.any_of(True, False) == (True, False)
    assert alone.gather("x") == ["x"]
    assert alone.broadcast("x") == "x"
    alone.require_same({"seed": 1})
    with pytest.raises(ConfigError, match="mine"), alone.failing_together():
        raise ConfigError("mine")


def test_the_version_of_the_code_changes_with_a_source(monkeypatch, tmp_path):
    before = code_version()
    assert code_version() == before
    (tmp_path / "kernel.cpp").write_text("// another one")
    monkeypatch.setattr("rwkv_train.training.code_version.find_asset_folder", lambda name: tmp_path)
    assert code_version() != before


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"])
def test_a_variable_of_a_launcher_that_is_no_number_is_named(name):
    with pytest.raises(
        ConfigError, match=f"variable {name} is 'x', it must be a number; correct or unset it"
    ):
        require_numbers({name: "x"})
