"""Where the processes of a run find each other, and refuse to start together."""

import json
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn

import torch

# torch has no stubs that export these names.
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.errors import ConfigError, RwkvTrainError
from rwkv_train.parallel.agreement import joined
from rwkv_train.parallel.lost import name_ranks
from rwkv_train.parallel.world import World, require_size

_POLL_SECONDS = 0.05


def meet(world: World, settings: TrainerConfig, backend: str, connect_seconds: float) -> tuple[Store, str]:
    """Wait for the other processes, and refuse on all what any of them refuses.

    Args:
        world: place of this process.
        settings: of the run, as this process sees them.
        backend: of the default group, as this process would choose it.
        connect_seconds: how long to wait.

    Returns:
        The store where they met, and the start of the run's keys in it.

    Raises:
        ConfigError: they do not find each other, or do not fit together.
    """
    store, prefix, refusal = _come_together(
        world, _refusal(world, settings, backend), backend, connect_seconds
    )
    if refusal is not None:
        raise refusal
    return store, prefix


def meet_to_refuse(world: World, error: RwkvTrainError, connect_seconds: float) -> NoReturn:
    """Tell the other processes, who may see nothing wrong, why this one cannot take part.

    Args:
        world: place of this process.
        error: what is wrong.
        connect_seconds: how long to wait for them.

    Raises:
        RwkvTrainError: on all processes, with the rank unless all have the same; ``error`` if they do not come.
    """
    try:
        _, _, refusal = _come_together(world, str(error), "", connect_seconds)
    except ConfigError:
        raise error from None
    assert refusal is not None
    raise refusal from error


def _come_together(
    world: World, refusal: str, backend: str, connect_seconds: float
) -> tuple[Store, str, Exception | None]:
    """Wait for the other processes; return what speaks against starting, too."""
    deadline = time.monotonic() + connect_seconds
    store = _connect(world, connect_seconds)
    prefix = f"rwkv-train/{world.run_id}/{world.attempt}"
    start = PrefixStore(f"{prefix}/start", store)
    try:
        start.set(str(world.rank), json.dumps([refusal, backend]))
        _wait_for_all(start, world, deadline, connect_seconds)
        starts = [json.loads(start.get(str(rank))) for rank in range(world.world_size)]
        start.set(f"{world.rank} has read", "")
        shared = _common_refusal([refusal for refusal, _ in starts], [backend for _, backend in starts])
        if shared is not None:
            if world.is_host:  # the store goes with this process
                _wait_for(start, [f"{rank} has read" for rank in range(world.world_size)], deadline)
            shared.__dict__["is_reported_elsewhere"] = world.rank != 0
    except RuntimeError as error:
        raise _unreachable(world) from error
    return store, prefix, shared


def _connect(world: World, connect_seconds: float) -> Store:
    """Open the store at rank 0, or go to it."""
    box: list[Store | RuntimeError] = []

    def open_store() -> None:
        try:
            store = TCPStore(
                world.address,
                world.port,
                is_master=world.is_host,
                wait_for_workers=False,
                timeout=timedelta(seconds=connect_seconds),
            )
        except RuntimeError as error:
            box.append(error)
        else:
            box.append(store)

    # torch waits for ever for the answer of a program that is not such a store.
    thread = threading.Thread(target=open_store, daemon=True)
    thread.start()
    thread.join(timeout=connect_seconds)
    outcome = box[0] if box else RuntimeError("no answer")
    if not isinstance(outcome, RuntimeError):
        return outcome
    if world.is_host and "EADDRINUSE" in str(outcome):
        raise ConfigError(
            f"MASTER_PORT ({world.port}) is in use by another program, so the other processes cannot come here; set "
            "MASTER_PORT to a free port"
        ) from outcome
    raise _unreachable(world) from outcome


def _unreachable(world: World) -> ConfigError:
    return ConfigError(
        f"rank {world.rank} cannot reach rank 0 at {world.address}:{world.port} (MASTER_ADDR, MASTER_PORT): it has not "
        "come or has left, or another program has that port, or a firewall is between"
    )


def _wait_for_all(start: Store, world: World, deadline: float, connect_seconds: float) -> None:
    missing = _wait_for(start, [str(rank) for rank in range(world.world_size)], deadline)
    if not missing and not start.check(["missing"]):
        return
    if missing and world.is_host:
        start.set("missing", json.dumps(missing))
        time.sleep(1)  # so that the others can read it
    is_known = start.check(["missing"])
    names = json.loads(start.get("missing")) if is_known else missing
    error = ConfigError(
        f"{name_ranks([int(name) for name in names])} did not come to {world.address}:{world.port} within "
        f"{connect_seconds:g} s; see what ended there, or why it started late"
    )
    error.is_reported_elsewhere = is_known and not world.is_host
    raise error


def _wait_for(start: Store, names: list[str], deadline: float) -> list[str]:
    """Return those of the names that are still missing at the deadline, or when rank 0 waits no longer."""
    missing = names
    while missing and time.monotonic() < deadline and not start.check(["missing"]):
        missing = [name for name in missing if not start.check([name])]
        if missing:
            time.sleep(_POLL_SECONDS)
    return missing


def _refusal(world: World, settings: TrainerConfig, backend: str) -> str:
    """Say what speaks against this process taking part."""
    try:
        require_size(settings, world)
    except ConfigError as error:
        return str(error)
    n_gpus = torch.cuda.device_count() if backend == "nccl" else 0
    if backend == "nccl" and world.local_rank >= n_gpus:
        return (
            f"process {world.local_rank} of its machine has no GPU, it sees {n_gpus}; lower trainer.devices, or let "
            "every process see all GPUs (CUDA_VISIBLE_DEVICES; in SLURM --gpus-per-node, not --gpus-per-task)"
        )
    return ""


def _common_refusal(refusals: Sequence[str], backends: Sequence[str]) -> Exception | None:
    """Return what all processes are to raise, given what each of them has to say."""
    shared = joined([(ConfigError, (refusal,)) if refusal else None for refusal in refusals])
    if shared is None and len(set(backends)) > 1:
        other = next(rank for rank, backend in enumerate(backends) if backend != backends[0])
        shared = ConfigError(
            f"rank {other} would use {backends[other]} but rank 0 {backends[0]}: one machine has GPUs and another has "
            "none; set trainer.accelerator"
        )
    return shared
