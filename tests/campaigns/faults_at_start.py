"""Faults that a run has to refuse at its start: on all processes, with one line, exit code 2, within 30 seconds."""

import shutil
import signal
import socket
from collections.abc import Mapping

from tests.campaigns.disk import SmallDisk
from tests.campaigns.runs import Command, SmallRun
from tests.campaigns.trial import REFUSED, Trial

SPARE_BYTES = 500_000


def full_disk(trial: Trial) -> None:
    """There is no room for a checkpoint; once there is, the same command runs."""
    with SmallDisk(trial.folder / "disk", 64) as disk:
        run = trial.run(out_dir=disk.folder / "run")
        disk.fill(SPARE_BYTES)
        trial.refused(run.start(prefix=disk.prefix), "free some space")
        disk.empty()
        trial.goes_on(run, run.start(prefix=disk.prefix), disk.seen_from_here(run.out_dir))


def read_only_folder(trial: Trial) -> None:
    """The disk cannot be written to; once it can, the same command runs."""
    with SmallDisk(trial.folder / "disk", 64) as disk:
        run = trial.run(out_dir=disk.folder / "run")
        disk.remount("ro")
        trial.refused(run.start(prefix=disk.prefix), "trainer.out_dir")
        disk.remount("rw")
        trial.goes_on(run, run.start(prefix=disk.prefix), disk.seen_from_here(run.out_dir))


def read_only_folder_of_a_run(trial: Trial) -> None:
    """As before, but the folder holds checkpoints already."""
    with SmallDisk(trial.folder / "disk", 64) as disk:
        run = trial.run(out_dir=disk.folder / "run")
        command = run.start(prefix=disk.prefix)
        trial.wait_for_step(command, disk.seen_from_here(run.out_dir), 2)
        command.kill_all()
        disk.remount("ro")
        trial.refused(run.start(prefix=disk.prefix), "trainer.out_dir")
        disk.remount("rw")
        trial.goes_on(run, run.start(prefix=disk.prefix), disk.seen_from_here(run.out_dir))


def two_runs_in_one_folder(trial: Trial) -> None:
    """The second one is refused, the first one does not notice."""
    run = trial.run()
    first = run.start()
    trial.wait_for_step(first, run.out_dir, 1)
    first.send_to_all(signal.SIGSTOP)  # so that it is still there when the second one comes
    trial.refused(run.start(), "is in use by another run")
    first.send_to_all(signal.SIGCONT)
    trial.goes_on(run, first)


def port_in_use(trial: Trial) -> None:
    """MASTER_PORT belongs to another program."""
    run = trial.run()
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        trial.refused(run.start(environment={"MASTER_PORT": str(port)}), "MASTER_PORT")
    trial.goes_on(run, run.start(environment={"MASTER_PORT": str(port)}))


def port_in_use_without_our_launcher(trial: Trial) -> None:
    """The same with processes started one by one, as torchrun does."""
    run = trial.run()
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        ranks = [run.start(environment=_torchrun(rank, trial.devices, port)) for rank in range(trial.devices)]
        for command in ranks:
            trial.refused(command, "MASTER_PORT")


def rank_with_another_config(trial: Trial) -> None:
    """One process got another learning rate; rank 0 says so for all."""
    run = trial.run()
    ranks = _start_by_hand(trial, run, {1: ("--set", "optim.lr=4e-3")})
    trial.refused(ranks[0], "optim.lr is 0.004 on rank 1 but 0.003 on rank 0")
    for command in ranks[1:]:
        trial.refused(command, "", errors=0)
    for command in _start_by_hand(trial, run, {})[1:]:
        trial.ends(command, 0, within=120, errors=0)
    trial.goes_on(run, run.commands[-trial.devices])


def rank_with_an_invalid_config(trial: Trial) -> None:
    """What one process got is refused by itself, while the other one sees nothing wrong."""
    ranks = _start_by_hand(trial, trial.run(), {1: ("--set", "optim.lr=1e-4")})
    trial.refused(ranks[0], "rank 1: optim: lr_final (0.0003) must not be above lr (0.0001)")
    for command in ranks[1:]:
        trial.refused(command, "", errors=0)


def missing_rank(trial: Trial) -> None:
    """Rank 1 never comes."""
    run = trial.run()
    command = run.start(environment=_torchrun(0, trial.devices, _free_port()))
    trial.ends(command, REFUSED, within=90, says="rank 1 did not come")  # 60 s after it is ready itself


def world_size_that_does_not_divide(trial: Trial) -> None:
    """8 samples cannot be shared by three processes with 4 at once."""
    run = trial.run({"trainer.devices": 3})
    trial.refused(run.start(), "global_batch_size")
    trial.promise(not run.out_dir.exists(), "the folder of the run was made")


def checkpoint_of_another_model(trial: Trial) -> None:
    """The folder holds a run of a smaller model; with its settings it goes on."""
    run = trial.run()
    command = run.start()
    trial.wait_for_step(command, run.out_dir, 2)
    command.kill_all()
    trial.refused(run.start("--set", "model.n_embd=64"), "model.n_embd")
    trial.goes_on(run, run.start())


def resume_from_another_model(trial: Trial) -> None:
    """``--resume`` names the checkpoint of a smaller model."""
    small, large = trial.run(), trial.run({"model.n_embd": 64})
    command = small.start()
    trial.wait_for_step(command, small.out_dir, 2)
    command.kill_all()
    trial.refused(large.start("--resume", str(small.out_dir)), "model.n_embd")


def every_checkpoint_damaged(trial: Trial) -> None:
    """All there is has a flipped bit; nothing is started over by itself."""
    run = trial.run()
    shutil.copytree(trial.reference(run).out_dir, run.out_dir)
    for path in (run.out_dir / "checkpoints").glob("step-*/model.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    trial.refused(run.start(), "every checkpoint in it is damaged")


def _start_by_hand(trial: Trial, run: SmallRun, extra: Mapping[int, tuple[str, ...]]) -> list[Command]:
    port = _free_port()
    return [
        run.start(*extra.get(rank, ()), environment=_torchrun(rank, trial.devices, port))
        for rank in range(trial.devices)
    ]


def _torchrun(rank: int, n_ranks: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_WORLD_SIZE": str(n_ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "campaign",
    }


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
    return port
