"""Who is missing, in one sentence."""

from collections.abc import Mapping, Sequence

from rwkv_train.parallel.pulse import Seen
from rwkv_train.parallel.world import World

GO_ON = "the same command goes on from the last checkpoint"
_BROKEN_CONNECTION = (
    "gloo/transport",
    "NCCL error",
    "ncclRemoteError",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
)
"""Parts of the messages of torch's collectives, which have no class of their own on gloo."""


def is_broken_connection(error: RuntimeError) -> bool:
    """Tell whether an error of torch says that other processes could not be reached."""
    is_of_torch = type(error).__module__.startswith("torch.distributed")
    return is_of_torch or any(part in str(error) for part in _BROKEN_CONNECTION)


def name_ranks(ranks: Sequence[int]) -> str:
    """Return ``"rank 3"`` or ``"ranks 3, 5"``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def after_a_break(world: World, seen: Mapping[int, Seen] | None, error: RuntimeError) -> str:
    """Say who is missing after a collective has failed."""
    if seen is None:
        return f"{_host(world)} is gone or does not answer; {GO_ON}"
    left = {rank: one.sign.left for rank, one in seen.items() if one.sign.left}
    if left:
        rank, why = next(iter(left.items()))
        return f"rank {rank} left the run: {why}; {GO_ON}"
    silent = [rank for rank, one in seen.items() if not one.is_alive]
    if silent:
        return f"{name_ranks(silent)} is gone or does not answer; {GO_ON}".replace(
            "is gone or does", "are gone or do" if len(silent) > 1 else "is gone or does"
        )
    reason = " ".join(str(error).split())
    return f"the connection between processes failed though all of them run ({reason}); {GO_ON}"


def after_no_progress(world: World, seen: Mapping[int, Seen] | None, seconds: float) -> str:
    """Say who holds the others up after ``seconds`` without a step."""
    start = f"no progress for {seconds:g} s (trainer.hang_timeout_seconds): "
    if seen is None:
        return f"{start}{_host(world)} does not answer; {GO_ON}"
    silent = [rank for rank, one in seen.items() if not one.is_alive or one.sign.left]
    if silent:
        verb = "do" if len(silent) > 1 else "does"
        return f"{start}{name_ranks(silent)} {verb} not answer; {GO_ON}"
    beats = {rank: one.sign.beats for rank, one in seen.items()}
    behind = [rank for rank in seen if beats[rank] < max(beats.values())]
    # Equal counts: who does something else than wait for the others.
    behind = behind or [rank for rank, one in seen.items() if not one.sign.is_waiting]
    if not behind or len(behind) == len(seen):
        return f"{start}no process is behind the others; rank 0 is at {seen[0].sign.place}; {GO_ON}"
    verb = "are" if len(behind) > 1 else "is"
    return f"{start}{name_ranks(behind)} {verb} behind the others, at {seen[behind[0]].sign.place}; {GO_ON}"


def _host(world: World) -> str:
    if world.is_agent_the_host:
        return f"torchrun on the first machine ({world.address}:{world.port})"
    return "rank 0"
