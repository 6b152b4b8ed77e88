"""How fast a device trains a model, tried out in about two seconds.

The cost of a layer is measured on real kernels and not worked out from operations: recurrences, adapters and
quantized layers do not reach the speed of a matrix product. So that a large model takes seconds too, what is measured
is a model of one layer and one of two, whose difference is what each further layer costs.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.config.methods import FreezeMethod, FullMethod, LoraMethod, Method
from rwkv_train.finetuning.method import apply_method
from rwkv_train.finetuning.quantized import quantize_linears
from rwkv_train.finetuning.targets import find_targets
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model, count_parameters
from rwkv_train.ops.context import packed_context
from rwkv_train.training.precision import autocast_of, prepare_forward

_SECONDS = 0.4  # for each of four measurements
_FIRST_TOKENS = 32
_LARGEST = {"cpu": 400_000_000, "cuda": 8_000_000_000}  # parameters that are made and filled in seconds


class Speed(NamedTuple):
    """Seconds that one device needs for a token of a row."""

    train_seconds: float
    """Forward and backward."""
    forward_seconds: float


def measure_speed(
    config: FinetuneConfig, wkv_backend: str, device: torch.device, encode: Callable[[str], Sequence[int]]
) -> Speed | None:
    """Measure the forward and the backward of a training step, without the optimizer's part and exchanges.

    ``trainer.compile`` is left out; a layer of "freeze" is taken to learn.

    Args:
        config: the settings of the run.
        wkv_backend: name of the recurrence's backend, which can run here.
        device: where.
        encode: text -> ids of tokens.

    Returns:
        ``None`` where two layers are too large to be made in seconds.
    """
    n_layer = config.model.n_layer
    smaller = [config.model.model_copy(update={"n_layer": n}) for n in (1, 2) if n <= n_layer]
    if count_parameters(smaller[-1]) > _LARGEST[device.type]:
        return None
    method = _of_any_layer(config)
    found = []
    for sizes in smaller:
        model = build_model(sizes, wkv_backend=wkv_backend, device=device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)  # no zeros, by which a method may divide
        if not isinstance(method, FullMethod | FreezeMethod) and method.quantize != "none":
            quantize_linears(model, method.quantize, device)
        apply_method(model, method, encode, config.trainer.seed)
        model.to(device)
        prepare_forward(model, config.trainer.model_copy(update={"compile": False}))
        found.append(_measure(model, config, device))
    first, last = found[0], found[-1]
    train, forward = (one + (n_layer - 1) * max(0.0, two - one) for one, two in zip(first, last, strict=True))
    return Speed(train, forward)


def _of_any_layer(config: FinetuneConfig) -> Method:
    """Return a method that costs a layer what the real one does, in a model of fewer layers."""
    method = config.finetune
    if isinstance(method, FreezeMethod):
        return FullMethod()
    if not isinstance(method, LoraMethod):
        return method
    targets = find_targets(build_model(config.model, device="meta"), method)
    kinds = sorted({name.split(".", 2)[2] for name in targets})  # "att.key" of "blocks.3.att.key"
    changes = {"targets": [f"*.{kind}" for kind in kinds], "rank_pattern": {}, "alpha_pattern": {}}
    # PiSSA differs by the values that it starts from.
    variant = "lora" if method.variant == "pissa" else method.variant
    return method.model_copy(update={**changes, "variant": variant})


def _measure(model: LanguageModel, config: FinetuneConfig, device: torch.device) -> Speed:
    def run(n_tokens: int, *, learns: bool) -> None:
        tokens = torch.zeros(1, n_tokens, dtype=torch.int64, device=device)
        context = packed_context(torch.tensor([0, n_tokens], device=device))
        with torch.set_grad_enabled(learns), autocast_of(config.trainer.precision, device):
            losses = model(tokens, targets=tokens, context=context).losses
            if learns:
                losses.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    most = config.trainer.micro_batch_size * config.model.ctx_len
    n_tokens = min(_FIRST_TOKENS, most)
    run(n_tokens, learns=True)  # the first call of everything takes longer
    seconds = 0.0
    while seconds < _SECONDS / 4 and n_tokens < most:
        n_tokens = min(4 * n_tokens, most)
        seconds = _best_of(2, run, n_tokens, learns=True)
    n_times = 1 + min(4, int(_SECONDS / max(seconds, 1e-3)))
    return Speed(
        _best_of(n_times, run, n_tokens, learns=True) / n_tokens,
        _best_of(n_times, run, n_tokens, learns=False) / n_tokens,
    )


def _best_of(n_times: int, run: Callable[..., None], n_tokens: int, *, learns: bool) -> float:
    """Time a call: on a busy machine the shortest of several times is the one that it takes."""
    found = []
    for _ in range(n_times):
        started = time.perf_counter()
        run(n_tokens, learns=learns)
        found.append(time.perf_counter() - started)
    return min(found)
