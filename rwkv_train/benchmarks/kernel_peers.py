"""Other implementations of the recurrences, brought to our conventions so that they can be measured beside ours."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_train.errors import ConfigError
from rwkv_train.ops.prepare import OPERATORS
from rwkv_train.ops.wkv4 import wkv4_zero_state

PeerFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""Takes the operator's inputs in our order and conventions, without the state (a text begins), and for packed rows
``cu_seqlens=``; returns y and the final state, which may be None."""

FLA = "fla"
"""The package of flash-linear-attention (``pip install flash-linear-attention``); adapted to version 0.6."""
LOWEST_DECAY_OF_RWKV7 = -0.6065306597126334
"""-exp(-1/2): the model's log decay is not lower, and neither is that of our inputs."""


class Peer(NamedTuple):
    """One implementation of one operator."""

    name: str
    op: str
    function: PeerFunction


def load_peer(given: str, ops: Sequence[str] | None) -> Peer:
    """Import a plug-in: a function that takes an operator's inputs and returns y and the final state.

    Args:
        given: ``MODULE:FUNCTION`` or ``OP=MODULE:FUNCTION``; Python must find the module (PYTHONPATH).
        ops: the operators that are measured; where there is just one it need not be said again.

    Raises:
        ConfigError: it is not of this form, has no operator, or cannot be imported.
    """
    op, has_op, place = given.rpartition("=")
    module_name, colon, function_name = place.partition(":")
    if not (module_name and colon and function_name):
        raise ConfigError(f"--peer {given}: wanted MODULE:FUNCTION or OP=MODULE:FUNCTION")
    if not has_op:
        if ops is None or len(ops) != 1:
            raise ConfigError(
                f"--peer {given} does not say which operator the function computes; give one --op, or OP={place}"
            )
        op = ops[0]
    if op not in OPERATORS:
        raise ConfigError(
            f"--peer {given}: there is no operator '{op}'; choose one of {', '.join(OPERATORS)}"
        )
    if ops is not None and op not in ops:
        raise ConfigError(f"--peer {given} computes {op}, which is not measured; add --op {op}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # foreign code may raise anything, or exit, while it is imported
        raise ConfigError(f"--peer {given}: {module_name} cannot be imported: {first_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"--peer {given}: {module_name} has no function {function_name}")
    return Peer(function_name, op, function)


def importable_peers(device_type: str) -> tuple[list[Peer], str | None]:
    """Return the known implementations that can run here, and a sentence for what is missing.

    Args:
        device_type: they need ``"cuda"``, being written in Triton; elsewhere none is looked for.
    """
    if device_type != "cuda":
        return [], None
    if not _is_installed(FLA):
        return (
            [],
            "flash-linear-attention is not installed; it is left out (pip install flash-linear-attention)",
        )
    try:
        modules = {name: importlib.import_module(f"{FLA}.ops.{name}") for name in ("rwkv4", "rwkv6", "rwkv7")}
        return _fla_peers(modules), None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it brings Triton and transformers along
        return [], f"flash-linear-attention cannot be imported; it is left out: {first_line(error)}"


def peer_versions() -> dict[str, str]:
    """Return the versions of what the known implementations are made of, as far as it is installed."""
    found: dict[str, str] = {}
    for name in ("flash-linear-attention", "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of what it says."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _fla_peers(modules: Mapping[str, Any]) -> list[Peer]:
    """Adapt flash-linear-attention: ``[B, T, H, N]`` and log decays as ours, states ``[key, value]``.

    Its matrix recurrences multiply r by 1 / sqrt(N) unless told otherwise. It has no RWKV-5: RWKV-6 with the same
    decay for every token stands in, as its users do. Its recurrent RWKV-7 has no backward.
    """
    chunk_rwkv7, recurrent_rwkv7 = modules["rwkv7"].chunk_rwkv7, modules["rwkv7"].fused_recurrent_rwkv7
    chunk_rwkv6, recurrent_rwkv6 = modules["rwkv6"].chunk_rwkv6, modules["rwkv6"].fused_recurrent_rwkv6
    recurrent_rwkv4 = modules["rwkv4"].fused_recurrent_rwkv4

    def wkv7_by(function: Callable[..., Any], **options: Any) -> PeerFunction:
        def run(
            r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, cu_seqlens: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            y, state = function(
                r, w, k, v, a, b, scale=1.0, output_final_state=True, cu_seqlens=cu_seqlens, **options
            )
            return y, state.mT

        return run

    def wkv6_by(function: Callable[..., Any]) -> PeerFunction:
        def run(
            r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, cu_seqlens: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            y, state = function(r, k, v, w, u, scale=1.0, output_final_state=True, cu_seqlens=cu_seqlens)
            return y, state.mT

        return run

    def wkv5_by(function: Callable[..., Any]) -> PeerFunction:
        def run(
            r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, cu_seqlens: Tensor | None = None
        ) -> tuple[Tensor, Tensor | None]:
            return wkv6_by(function)(r, w.expand(r.shape), k, v, u, cu_seqlens=cu_seqlens)

        return run

    def wkv4_recurrent(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # It takes the logarithm of the decay rate, and a state [B, 3, 1, C].
        state = wkv4_zero_state(len(k), k.shape[2], k.device).unsqueeze(2)
        y, final_state = recurrent_rwkv4(torch.log(-w), u, k, v, state)
        return y, final_state.squeeze(2)

    # As in its own layer: decays that are known to be mild allow larger chunks and tensor cores.
    mild = {"safe_gate": True, "lower_bound": LOWEST_DECAY_OF_RWKV7}
    return [
        Peer("fla_chunk", "wkv7", wkv7_by(chunk_rwkv7, **mild)),
        Peer("fla_recurrent", "wkv7", wkv7_by(recurrent_rwkv7)),
        Peer("fla_chunk", "wkv6", wkv6_by(chunk_rwkv6)),
        Peer("fla_recurrent", "wkv6", wkv6_by(recurrent_rwkv6)),
        Peer("fla_chunk", "wkv5", wkv5_by(chunk_rwkv6)),
        Peer("fla_recurrent", "wkv5", wkv5_by(recurrent_rwkv6)),
        Peer("fla_recurrent", "wkv4", wkv4_recurrent),
    ]
