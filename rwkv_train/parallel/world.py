"""Which process of how many this one is, as whoever started it says in the environment.

One form is read: torchrun's variables (https://docs.pytorch.org/docs/stable/elastic/run.html). Our own launcher sets
them too, and SLURM's are translated into them, so that nothing else has to know how the run was started.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import ConfigError

LAUNCHER_PID = "RWKV_TRAIN_LAUNCHER_PID"
"""Set by our launcher: a process whose launcher has vanished ends."""
HOW_TO_START = "start it with torchrun, or with SLURM's srun, on each machine (docs/scaling-out.md)"
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_OTHER_NUMBERS = (
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NUM_NODES",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_JOB_ID",
)


class World(NamedTuple):
    """The place of this process among those of the run, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this process on its machine: the GPU it takes."""
    address: str
    """Host of rank 0, where the processes meet."""
    port: int
    run_id: str
    attempt: int
    """How often torchrun has restarted the processes of this run."""
    is_agent_the_host: bool
    """Whether torchrun's agent keeps the meeting point; if not, rank 0 does."""
    launcher: int | None
    """Process id of our own launcher."""

    @property
    def is_host(self) -> bool:
        """Whether this process keeps the meeting point."""
        return self.rank == 0 and not self.is_agent_the_host


def is_launched(environment: Mapping[str, str]) -> bool:
    """Tell whether a launcher (ours, torchrun, srun of several tasks) started this process."""
    return "RANK" in environment or "TORCHELASTIC_RUN_ID" in environment or _is_slurm_task(environment)


def rank_of(environment: Mapping[str, str]) -> int:
    """Return the number of this process, before anything was checked: for what it says, not for what it does."""
    given = environment.get("RANK", environment.get("SLURM_PROCID", "0"))
    return int(given) if given.isdigit() else 0


def read_world(environment: Mapping[str, str]) -> World | None:
    """Return what the environment says, or None if this process was started alone.

    Raises:
        ConfigError: some of the variables are missing or are no numbers.
    """
    if not is_launched(environment):
        return None
    if "RANK" not in environment and _is_slurm_task(environment):
        environment = {**environment, **slurm_as_torchrun(environment)}
    missing = [name for name in (*_NUMBERS, "MASTER_ADDR") if name not in environment]
    if missing:
        raise ConfigError(
            f"the environment has RANK or TORCHELASTIC_RUN_ID but not {', '.join(missing)}; unset it for a run on this "
            f"machine alone, or {HOW_TO_START}"
        )
    require_numbers(environment)
    return World(
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        local_rank=int(environment["LOCAL_RANK"]),
        address=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        run_id=environment.get("TORCHELASTIC_RUN_ID", ""),
        attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
        is_agent_the_host=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        launcher=int(environment[LAUNCHER_PID]) if LAUNCHER_PID in environment else None,
    )


def require_numbers(environment: Mapping[str, str]) -> None:
    """Refuse variables of launchers that are no numbers; other libraries read them too, when they are imported.

    Raises:
        ConfigError: one of them is not.
    """
    for name in (*_NUMBERS, *_OTHER_NUMBERS):
        if name in environment and not (environment[name].isascii() and environment[name].isdigit()):
            raise ConfigError(
                f"the environment variable {name} is '{environment[name]}', it must be a number; correct or unset it"
            )


def require_size(settings: TrainerConfig, world: World | None) -> None:
    """Refuse settings that ask for another number of processes than were started.

    Raises:
        ConfigError: they do.
    """
    asked = f"trainer.devices ({settings.devices}) x trainer.num_nodes ({settings.num_nodes})"
    if world is None and settings.world_size > 1:
        raise ConfigError(
            f"{asked} is {settings.world_size} processes but this one was started alone; {HOW_TO_START}, or on one "
            "machine with `rwkv-train pretrain`, which starts the others"
        )
    if world is not None and world.world_size != settings.world_size:
        raise ConfigError(
            f"{asked} is {settings.world_size} processes but the launcher started {world.world_size} (WORLD_SIZE); set "
            "them to the devices of a machine and the number of machines, or start as many processes"
        )


def translate_slurm() -> None:
    """Give this process torchrun's variables if it is one of several tasks of ``srun``: others read them too.

    Raises:
        ConfigError: SLURM's variables are incomplete.
    """
    if "RANK" not in os.environ and _is_slurm_task(os.environ):
        os.environ.update(slurm_as_torchrun(os.environ))


def _is_slurm_task(environment: Mapping[str, str]) -> bool:
    # Set by srun for its tasks; SLURM_NTASKS is set in a batch script too, which is one process.
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def slurm_as_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for a task of ``srun`` (https://slurm.schedmd.com/srun.html, output environment).

    Raises:
        ConfigError: one of SLURM's variables is missing.
    """
    # Loads torch, which whoever asks for this is about to do.
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment  # noqa: PLC0415

    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ConfigError(
            f"this is a task of srun but {', '.join(missing)} is not in its environment; start it with "
            "`srun --export=ALL`"
        )
    job = environment["SLURM_JOB_ID"]
    n_tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    n_nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(n_tasks),
        "LOCAL_WORLD_SIZE": str(n_tasks // n_nodes),
        "GROUP_RANK": environment["SLURM_NODEID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or SLURMEnvironment.resolve_root_node_address(environment["SLURM_STEP_NODELIST"]),
        # Known to every task without asking; apart for jobs that share a machine.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(15000 + int(job) % 10000),
        "TORCHELASTIC_RUN_ID": f"slurm-{job}.{environment.get('SLURM_STEP_ID', '0')}",
        "TORCHELASTIC_RESTART_COUNT": environment.get("SLURM_RESTART_COUNT", "0"),
    }
