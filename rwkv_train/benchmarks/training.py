"""The time of a whole training step: forward, backward, clipping, optimizer."""

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from rwkv_train.config.model import ModelConfig, Rwkv4Config, Rwkv6Config, Rwkv7Config
from rwkv_train.config.optim import OptimConfig
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model, initialize, recurrence_of
from rwkv_train.ops.prepare import OPERATORS
from rwkv_train.training.engine import make_optimizer
from rwkv_train.training.precision import compile_blocks


class StepTimes(NamedTuple):
    """Seconds of the parts of one step."""

    forward: float
    backward: float
    update: float
    """Clipping and the optimizer."""

    @property
    def total(self) -> float:
        """The whole step."""
        return self.forward + self.backward + self.update


class Case(NamedTuple):
    """What a step trains: a model and the samples in a micro-batch."""

    config: ModelConfig
    micro_batch_size: int


STANDARD_CPU = (
    Case(Rwkv7Config(n_layer=8, n_embd=512, vocab_size=257, ctx_len=512), 4),
    Case(Rwkv4Config(n_layer=8, n_embd=512, vocab_size=257, ctx_len=512), 4),
)
STANDARD_GPU = (
    # 1.5 billion parameters; and the small model that the official trainer shows, with its batch.
    Case(Rwkv7Config(n_layer=24, n_embd=2048, ctx_len=4096), 2),
    Case(Rwkv7Config(n_layer=12, n_embd=768, ctx_len=512), 16),
    Case(Rwkv6Config(n_layer=24, n_embd=2048, ctx_len=4096), 2),
    Case(Rwkv4Config(n_layer=24, n_embd=2048, ctx_len=1024), 8),
)
"""What ``rwkv-train bench training`` measures. On a GPU two models of the first size with what their backward keeps
fit into 141 GB, on smaller ones name a single ``--backend``."""


def default_backends(case: Case, device: torch.device) -> list[str]:
    """Return the backends of the case's recurrence that training on a device comes down to."""
    op, _ = recurrence_of(case.config)
    names = ("cuda", "cuda_exact") if device.type == "cuda" else ("torch", "cpp")
    return [name for name in names if name in OPERATORS[op]]


def bench_training(
    case: Case,
    *,
    backends: Sequence[str],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiles: bool = False,
    repeats: int = 5,
    warmup: int = 2,
) -> list[dict[str, Any]]:
    """Measure training steps of one model with several recurrence backends, taken in turn.

    Args:
        case: the model and its batch; a sample has ``ctx_len`` tokens.
        backends: names of recurrence backends.
        device: where to run.
        dtype: float32, or bfloat16 for autocast.
        compiles: whether to measure each backend with compiled blocks, too.
        repeats: steps that are measured; the median counts.
        warmup: steps before those.

    Returns:
        One row for each backend, compiled or not: its name, sizes, seconds of the very first step, in which blocks are
        compiled, milliseconds of each part of the others, tokens per second, and 10^12 operations per second where a
        token takes 6 for each parameter, as they are commonly counted.
    """
    config = case.config
    tokens = torch.randint(
        config.vocab_size,
        (case.micro_batch_size, config.ctx_len + 1),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    ways = [(name, compiled) for name in backends for compiled in ((False, True) if compiles else (False,))]
    models: dict[tuple[str, bool], LanguageModel] = {}
    for backend, compiled in ways:
        model = build_model(config, wkv_backend=backend)
        initialize(model, seed=0)
        models[backend, compiled] = model.to(device)
        if compiled:
            compile_blocks(model)
    optimizers = {way: make_optimizer(model, config.arch, OptimConfig()) for way, model in models.items()}
    times: dict[tuple[str, bool], list[StepTimes]] = {way: [] for way in ways}
    for _ in range(warmup + repeats):
        for way in ways:  # in turn, so that a machine that slows down slows all of them
            times[way].append(_step(models[way], optimizers[way], tokens, dtype))
    n_parameters = sum(parameter.numel() for parameter in models[ways[0]].parameters())
    return [_row(case, n_parameters, way, times[way][0], times[way][warmup:]) for way in ways]


def _step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, dtype: torch.dtype
) -> StepTimes:
    marks = [_now(tokens.device)]
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = model(tokens[:, :-1], targets=tokens[:, 1:]).losses
    loss = losses.mean()
    marks.append(_now(tokens.device))
    loss.backward()
    marks.append(_now(tokens.device))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    marks.append(_now(tokens.device))
    return StepTimes(*(after - before for before, after in pairwise(marks)))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _row(
    case: Case, n_parameters: int, way: tuple[str, bool], first: StepTimes, times: list[StepTimes]
) -> dict[str, Any]:
    config, batch = case
    backend, compiled = way
    median = statistics.median(step.total for step in times)
    tokens_per_second = batch * config.ctx_len / median
    return {
        "arch": config.arch,
        "backend": backend,
        "compiled": compiled,
        "L": config.n_layer,
        "C": config.n_embd,
        "B": batch,
        "T": config.ctx_len,
        "first_step_seconds": first.total,
        "forward_ms": 1e3 * statistics.median(step.forward for step in times),
        "backward_ms": 1e3 * statistics.median(step.backward for step in times),
        "update_ms": 1e3 * statistics.median(step.update for step in times),
        "step_ms": 1e3 * median,
        "tokens_per_second": tokens_per_second,
        "parameters": n_parameters,
        "tflops_6n": 6e-12 * n_parameters * tokens_per_second,
    }
