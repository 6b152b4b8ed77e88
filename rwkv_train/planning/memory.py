"""The memory that one training step needs, counted on tensors that hold no data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_train.config.run import RunConfig
from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model, recurrence_of
from rwkv_train.models.start import Start
from rwkv_train.ops.context import PLAIN, SequenceContext
from rwkv_train.ops.cross_entropy import working_bytes
from rwkv_train.ops.prepare import OPERATORS
from rwkv_train.training.precision import COMPUTE_DTYPES, autocast_of, cast_in_forward

_FLOAT32, _BFLOAT16 = 4, 2


class MemoryEstimate(NamedTuple):
    """Memory of one process in bytes.

    On top come the program itself, the allocator's slack, and what FSDP2 and DeepSpeed gather for use and exchange,
    which their own settings bound (DeepSpeed's ``reduce_bucket_size``, ``stage3_max_live_parameters``).
    """

    model_bytes: int
    """Parameters, quantized weights, gradients, masters and moments that this process keeps on its device."""
    activation_bytes: int
    """What the forward of one micro-batch keeps for its backward, and what the backward of the head needs besides."""
    offloaded_bytes: int = 0
    """What it keeps in the CPU's memory instead."""
    weight_bytes: int = 0
    """Of ``model_bytes`` what holds the weights themselves."""

    @property
    def total_bytes(self) -> int:
        """All on the device."""
        return self.model_bytes + self.activation_bytes


class _Part(NamedTuple):
    """Something that there is for every parameter."""

    n_parameters: int
    bytes_each: int
    n_owners: int = 1
    """Processes that share it out among them."""
    is_offloaded: bool = False


def estimate_memory(
    config: RunConfig, wkv_backend: str, model: LanguageModel | None = None, n_sequences: int = 0
) -> MemoryEstimate:
    """Estimate the memory of one training step in one process.

    The forward runs once on tensors without data; every tensor that autograd keeps is counted once. With
    ``trainer.grad_checkpointing`` that is the input of each block, and the larger of what one block and what the
    rest of the model keeps: the rest is free again before the first block is computed anew.

    Args:
        config: the settings of the run.
        wkv_backend: name of the recurrence's backend.
        model: what is trained, on the device "meta", which this call takes; ``None``: the model of the settings, whole.
        n_sequences: sequences in a micro-batch of packed rows; 0: each row is one, and none is packed.
    """
    if model is None:
        model = build_model(config.model, wkv_backend=wkv_backend, device="meta")
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    parts = _parts(
        config.trainer,
        sum(size for size, _ in sizes),
        sum(size for size, is_trained in sizes if is_trained),
    )
    # Quantized weights, which no strategy divides.
    quantized = sum(buffer.nbytes for buffer in model.buffers())
    weights = parts[0]
    return MemoryEstimate(
        model_bytes=_total(part for part in parts if not part.is_offloaded) + quantized,
        activation_bytes=_activation_bytes(model, config, wkv_backend, n_sequences),
        offloaded_bytes=_total(part for part in parts if part.is_offloaded),
        weight_bytes=(0 if weights.is_offloaded else _total([weights])) + quantized,
    )


def _parts(settings: TrainerConfig, n_all: int, n_trained: int) -> list[_Part]:
    """What is kept of the model from step to step, by strategy; first the parameters."""
    world, stage = settings.world_size, settings.zero_stage
    if settings.strategy == "fsdp2":
        # Parameters (the masters, where the forward sees bfloat16 ones), gradients, two moments.
        return [_Part(n_all, _FLOAT32, world), _Part(n_trained, 3 * _FLOAT32, world)]
    if stage is None:
        is_alone = settings.strategy == "auto" and world == 1
        # DDP has a copy of every gradient, in which it is summed.
        n_gradients = 1 if is_alone else 2
        return [_Part(n_all, _FLOAT32), _Part(n_trained, (n_gradients + 2) * _FLOAT32)]
    is_bf16 = settings.precision == "bf16-params"
    optimizer_is_away = settings.offload != "none"
    parameters = _Part(
        n_all,
        _BFLOAT16 if is_bf16 else _FLOAT32,
        world if stage == 3 else 1,
        settings.offload == "optimizer_and_parameters",
    )
    gradients = _Part(n_trained, _FLOAT32, world if stage > 1 else 1, optimizer_is_away and stage > 1)
    moments = _Part(n_trained, 2 * _FLOAT32, world, optimizer_is_away)
    # Stage 3 in float32 updates its parameters themselves; the others have a copy, also where they could do without.
    if stage == 3 and not is_bf16 and not optimizer_is_away:
        return [parameters, gradients, moments]
    return [parameters, gradients, moments, _Part(n_trained, _FLOAT32, world, optimizer_is_away)]


def _total(parts: Iterable[_Part]) -> int:
    return sum(-(-part.n_parameters // part.n_owners) * part.bytes_each for part in parts)


class _Kept:
    """The storages that autograd keeps of a forward, by the block that first kept them."""

    def __init__(self, model: LanguageModel) -> None:
        self.inputs: dict[int, int] = {}
        """Storage -> bytes, of what blocks are called with."""
        self.by_block: dict[int | None, dict[int, int]] = {None: {}}
        """Number of a block, or ``None`` for the rest -> storage -> bytes."""
        self._own = {_storage_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._seen: set[int] = set()
        self._alive: list[Tensor] = []  # a freed storage's address may be used again
        self._block: int | None = None
        for number, block in enumerate(model.blocks):
            self.by_block[number] = {}
            block.register_forward_pre_hook(lambda _, inputs, number=number: self._enter(number, inputs))
            block.register_forward_hook(lambda *_: self._leave())

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor, once."""
        storage = _storage_of(tensor)
        if storage not in self._own and storage not in self._seen:
            self._seen.add(storage)
            self._alive.append(tensor)
            self.by_block[self._block][storage] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes_of(self, block: int | None) -> int:
        """Return what was first kept there, but for inputs of blocks."""
        return sum(size for storage, size in self.by_block[block].items() if storage not in self.inputs)

    def _enter(self, number: int, inputs: Any) -> None:
        self._block = number
        for tensor in _tensors_in(inputs):
            self._alive.append(tensor)
            self.inputs[_storage_of(tensor)] = tensor.untyped_storage().nbytes()

    def _leave(self) -> None:
        self._block = None


@contextmanager
def _taken_for_any_device(op: str, wkv_backend: str) -> Iterator[None]:
    """Let a backend for GPUs take tensors of a CPU, of which only the shapes are asked for."""
    table = OPERATORS[op]
    row = table[wkv_backend]
    table[wkv_backend] = row._replace(refuses=lambda problem: None)
    try:
        yield
    finally:
        table[wkv_backend] = row


def _activation_bytes(model: LanguageModel, config: RunConfig, wkv_backend: str, n_sequences: int) -> int:
    settings = config.trainer
    batch, ctx_len = settings.micro_batch_size, config.model.ctx_len
    shape = (1, batch * ctx_len) if n_sequences else (batch, ctx_len)
    is_bf16 = settings.precision == "bf16-params"
    casts = is_bf16 and settings.strategy in {"auto", "ddp"}
    # As if on a CPU: a GPU keeps the same tensors, and need not be there.
    with FakeTensorMode(), torch.device("cpu"):
        _give_memory(model, torch.bfloat16 if is_bf16 and not casts else None)
        model.head.recompute_logits = settings.grad_checkpointing
        kept = _Kept(model)
        if casts:
            cast_in_forward(model, torch.bfloat16)
        tokens = torch.zeros(shape, dtype=torch.int64)
        context = _packed(n_sequences) if n_sequences else PLAIN
        autocast = autocast_of(settings.precision, torch.device("cpu"))
        saved = torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor)
        with _taken_for_any_device(recurrence_of(config.model)[0], wkv_backend), autocast, saved:
            model(tokens, targets=tokens, context=context, with_penalty=config.optim.l2wrap > 0)
    head = working_bytes(
        batch * ctx_len,
        config.model.n_embd,
        config.model.vocab_size,
        COMPUTE_DTYPES[settings.precision],
        torch.bfloat16 if is_bf16 else torch.float32,
        weight_learns=model.head.weight.requires_grad,
    )
    if not settings.grad_checkpointing:
        return sum(sum(found.values()) for found in kept.by_block.values()) + head
    largest = max(kept.bytes_of(block) for block in kept.by_block if block is not None)
    return sum(kept.inputs.values()) + max(largest, kept.bytes_of(None) + head)


def _give_memory(model: LanguageModel, dtype: torch.dtype | None) -> None:
    """Put tensors that hold no data, but behave as if they did, in the place of a model's on "meta"."""
    for module in model.modules():
        is_start = isinstance(module, Start)
        for name, parameter in list(module.named_parameters(recurse=False)):
            kind = parameter.dtype if dtype is None or is_start else dtype
            values = torch.empty(parameter.shape, dtype=kind)
            module.register_parameter(name, nn.Parameter(values, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)


def _packed(n_sequences: int) -> SequenceContext:
    """The context of a packed row, whose numbers nobody looks at."""
    return SequenceContext(
        torch.zeros(n_sequences + 1, dtype=torch.int64),
        first=torch.zeros(n_sequences, dtype=torch.int64),
        last=torch.zeros(n_sequences, dtype=torch.int64),
        is_empty=torch.zeros(n_sequences, 1, dtype=torch.bool),
    )


def _tensors_in(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple):
        for value in values:
            yield from _tensors_in(value)


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
