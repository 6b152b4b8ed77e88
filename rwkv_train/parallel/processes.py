"""The processes of a run: how they find each other, agree on small things, and fail together."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

# torch has no stubs that export these names.
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import ConfigError, LostProcessError, RwkvTrainError
from rwkv_train.parallel.agreement import as_parts, joined
from rwkv_train.parallel.lost import GO_ON, after_a_break, is_broken_connection, name_ranks
from rwkv_train.parallel.meeting import meet, meet_to_refuse
from rwkv_train.parallel.pulse import Pulse
from rwkv_train.parallel.world import World, read_world, require_size, translate_slurm

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_SECONDS = 60.0
"""How long the processes wait for each other at the start: libraries on a busy or shared disk load that far apart."""
SLACK_SECONDS = 30.0
"""What a collective waits longer than the watchdog, which knows better who is missing."""
_SHOWN_LETTERS = 200


class Processes:
    """This process among those of the run. Every method but the flags is a collective: all call it, or none.

    Alone (world size 1) nothing is communicated.
    """

    def __init__(
        self,
        world: World | None = None,
        control: dist.ProcessGroup | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.rank = 0 if world is None else world.rank
        self.world_size = 1 if world is None else world.world_size
        self.local_rank = 0 if world is None else world.local_rank
        self.pulse = pulse
        self._world = world
        self._control = control

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is true on any process."""
        if self.world_size == 1 or not flags:
            return flags
        values = torch.tensor(flags, dtype=torch.uint8)
        with naming_lost_processes(self):
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._control)
        return tuple(map(bool, values.tolist()))

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; they are pickled, so keep them small."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with naming_lost_processes(self):
            dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value."""
        if self.world_size == 1:
            return value
        values = [value]
        with naming_lost_processes(self):
            dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise at the end of the block, on all processes, what was raised on any of them.

        This holds for errors that a user can repair and for the operating system's. Others are our mistakes and
        leave at once. There must be no collective in the block: not all processes may come to it.

        Raises:
            RwkvTrainError: or OSError: the one of the block, rank 0 prints it; with the rank's number if not all
                processes have it.
            LostProcessError: a process left during the block.
        """
        failure: RwkvTrainError | OSError | None = None
        try:
            yield
        except LostProcessError:
            raise
        except (RwkvTrainError, OSError) as error:
            failure = error
        if self.world_size == 1:
            if failure is not None:
                raise failure
            return
        failures = self.gather(None if failure is None else as_parts(failure))
        shared = joined(failures)
        if shared is not None:
            shared.__dict__["is_reported_elsewhere"] = not self.is_first
            raise shared from failure

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Check that all processes have the same facts (settings, versions, hashes); nested ones have dotted names.

        Raises:
            ConfigError: on all processes, with the rank, the fact and both values.
        """
        flat = {name: repr(value) for name, value in _flattened(facts)}
        everyone = self.gather(flat)
        with self.failing_together():
            for name in sorted({name for one in everyone for name in one}):
                values = [one.get(name, "nothing") for one in everyone]
                others = [rank for rank, value in enumerate(values) if value != values[0]]
                if others:
                    raise ConfigError(
                        f"{name} is {values[others[0]]} on {name_ranks(others)} but {values[0]} on rank 0; start all "
                        "processes with the same settings, code and data"
                    )

    def lost(self, error: RuntimeError) -> LostProcessError:
        """Return the error that names who is missing after ``error`` of a collective; takes a few seconds."""
        if self.pulse is None or self._world is None:
            return LostProcessError(f"a collective failed: {error}")
        verdict = self.pulse.verdict
        if verdict is None:
            seen = self.pulse.look()
            verdict = self.pulse.verdict or self.pulse.declare(after_a_break(self._world, seen, error))
        lost = LostProcessError(verdict.sentence)
        lost.is_reported_elsewhere = verdict.by != self.rank
        return lost


@contextmanager
def naming_lost_processes(processes: Processes) -> Iterator[None]:
    """Turn a broken connection between processes in the block into an error that names who is missing.

    Raises:
        LostProcessError: a collective of the block failed.
    """
    try:
        yield
    except RuntimeError as error:
        if processes.world_size == 1 or not is_broken_connection(error):
            raise
        raise processes.lost(error) from error


@contextmanager
def join_processes(
    settings: TrainerConfig, *, backend: str, always: bool = False, connect_seconds: float = CONNECT_SECONDS
) -> Iterator[Processes]:
    """Meet the other processes of the run, as the environment names them, and part from them at the end.

    Inside, ``torch.distributed`` is initialized if there are several processes.

    Args:
        settings: their number, and how long a collective may take.
        backend: of the default group: ``"gloo"`` or ``"nccl"``. Ours for control is always gloo.
        always: make a default group for one process too.
        connect_seconds: how long the processes wait for each other.

    Raises:
        ConfigError: another number of processes was started than the settings say; a port is in use; the processes do
            not find each other. On all processes.
        LostProcessError: one of them vanished.
    """
    translate_slurm()
    world = read_world(os.environ)
    if world is None or world.world_size == 1:
        require_size(settings, world)
        yield from _alone(backend if always else None)
        return
    host, prefix = meet(world, settings, backend, connect_seconds)
    pulse = Pulse(world, prefix)
    try:
        pulse.start(connect_seconds)
        control = _make_groups(
            world, PrefixStore(f"{prefix}/groups", host), settings, backend, connect_seconds
        )
    except RuntimeError as error:
        pulse.stop()
        raise LostProcessError(
            f"rank {world.rank} could not connect to the other processes: {' '.join(str(error).split())}; {GO_ON}"
        ) from error
    leaves_together = False
    try:
        yield Processes(world, control, pulse)
    except LostProcessError:
        pulse.linger()
        raise
    except BaseException as error:
        leaves_together = "is_reported_elsewhere" in vars(error)
        if not leaves_together:
            pulse.leave(f"{type(error).__name__}: {' '.join(str(error).split())[:_SHOWN_LETTERS]}")
        raise
    else:
        leaves_together = True
    finally:
        pulse.stop()
        if leaves_together:
            _part(control)
        # With an operation under way on a GPU this would wait for it.
        if dist.is_initialized() and (leaves_together or backend == "gloo"):
            dist.destroy_process_group()


def refuse_together(error: RwkvTrainError) -> NoReturn:
    """Raise on all processes of a run what one of them found before they have met, such as a wrong setting.

    Raises:
        RwkvTrainError: with the rank unless all have the same; ``error`` where this process is alone.
    """
    try:
        translate_slurm()
        world = read_world(os.environ)
    except ConfigError:
        world = None
    if world is None or world.world_size == 1:
        # Processes that cannot find each other: those of one machine read the same files, the first of them says it.
        error.is_reported_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
        raise error
    meet_to_refuse(world, error, CONNECT_SECONDS)


def _alone(backend: str | None) -> Iterator[Processes]:
    if backend is None:
        yield Processes()
        return
    if backend == "nccl":
        torch.cuda.set_device(0)
    # DeepSpeed remembers the first group that it sees, so one group serves all runs of this process.
    if dist.is_initialized() and dist.get_backend() != backend:
        dist.destroy_process_group()
    if not dist.is_initialized():
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    yield Processes()


def _make_groups(
    world: World, store: Store, settings: TrainerConfig, backend: str, connect_seconds: float
) -> dist.ProcessGroup:
    patience = timedelta(seconds=settings.hang_timeout_seconds + SLACK_SECONDS)
    connect = timedelta(seconds=connect_seconds)
    if backend == "nccl":
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(
        backend,
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=patience if backend == "nccl" else connect,
    )
    control: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=connect)
    store.set_timeout(patience)
    for group in (control, dist.group.WORLD):
        dist.distributed_c10d._set_pg_timeout(patience, group)
    return control


def _part(control: dist.ProcessGroup) -> None:
    """Wait for the others, so that the store's host is not the first to go; the work is done."""
    try:
        dist.barrier(group=control)
    except RuntimeError as error:
        logger.debug("parting: %s", error)


def _flattened(facts: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
