"""What a run makes small: the loss of a micro-batch, and the states that its sequences leave for the next step."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.data.module import Carry, MicroBatch, PairSequences
from rwkv_train.errors import CheckpointError
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.state import LayerState, ModelState, take_rows
from rwkv_train.ops.context import PLAIN, SequenceContext, count_sequences, packed_context


class Losses(NamedTuple):
    """What a micro-batch comes to: sums over its targets, scalars."""

    total: Tensor
    """What is to become small, penalties included."""
    loss: Tensor
    """The loss that is reported, detached."""
    metrics: Mapping[str, Tensor] = {}
    """What else is reported, detached, by name."""


class Objective(Protocol):
    """A loss that is a sum over targets. Divided by the targets of a whole step it is the loss of the step."""

    unit: str
    """Of the loss."""
    metrics: tuple[str, ...]
    """Names of what else it reports."""

    def __call__(self, model: LanguageModel, batch: MicroBatch, l2wrap: float) -> Losses:
        """Compute the losses of a micro-batch.

        Args:
            model: the model, in training mode.
            batch: on the model's device.
            l2wrap: factor of the penalty on each token's largest logit.
        """
        ...

    def carried(self) -> dict[str, Tensor]:
        """Return what the next step needs of the steps before, on the CPU, by name."""
        ...

    def restore(self, carried: Mapping[str, Tensor], lanes: frozenset[int]) -> None:
        """Take back what :meth:`carried` gave, as far as it is of these lanes."""
        ...

    def forget(self) -> None:
        """Let go of what a bad step has left."""
        ...


def context_of(batch: MicroBatch) -> SequenceContext:
    """Return how a micro-batch is cut into sequences."""
    return PLAIN if batch.cu_seqlens is None else packed_context(batch.cu_seqlens)


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return a micro-batch with its tensors on a device."""
    pairs = batch.pairs
    if pairs is not None:
        reference = pairs.reference
        if reference is not None:
            reference = reference[0].to(device), reference[1].to(device)
        pairs = PairSequences(pairs.chosen.to(device), pairs.rejected.to(device), reference)
    return batch._replace(
        tokens=batch.tokens.to(device),
        targets=batch.targets.to(device),
        cu_seqlens=None if batch.cu_seqlens is None else batch.cu_seqlens.to(device),
        pairs=pairs,
    )


def lanes_of(settings: TrainerConfig, rank: int) -> frozenset[int]:
    """Return the places in the global batch that a process reads."""
    places = range(settings.global_batch_size)
    return frozenset(
        lane for lane in places if lane // settings.micro_batch_size % settings.world_size == rank
    )


class NextTokenLoss:
    """Cross entropy of the next token. A segment begins with the state that the one before it ended with.

    The gradient does not go back into an earlier segment.
    """

    unit: str = "nats/token"
    metrics: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._states: dict[int, ModelState] = {}  # by lane, of a batch of one

    def __call__(self, model: LanguageModel, batch: MicroBatch, l2wrap: float) -> Losses:
        """Compute the losses of a micro-batch; see :class:`Objective`."""
        context = context_of(batch)
        output = model(
            batch.tokens,
            state=self._begin(model, batch, context),
            targets=batch.targets,
            context=context,
            with_penalty=l2wrap > 0,
        )
        if batch.carry is not None:
            self._note(batch.carry, output.state)
        loss = output.losses.sum()
        total = loss + l2wrap * output.penalties.sum() if l2wrap > 0 else loss
        return Losses(total, loss.detach())

    def carried(self) -> dict[str, Tensor]:
        """Return the states of lanes in the middle of a conversation, named ``LANE.LAYER.FIELD``."""
        return {
            f"{lane}.{layer}.{field}": tensor.cpu()
            for lane, state in self._states.items()
            for layer, layer_state in enumerate(state)
            for field, tensor in layer_state._asdict().items()
        }

    def restore(self, carried: Mapping[str, Tensor], lanes: frozenset[int]) -> None:
        """Take back states; the first step moves them to its device.

        Raises:
            CheckpointError: they are not states by lane and layer.
        """
        fields: dict[int, dict[int, dict[str, Tensor]]] = {}
        for name, tensor in carried.items():
            lane, _, rest = name.partition(".")
            layer, _, field = rest.partition(".")
            if not (lane.isdigit() and layer.isdigit() and field in LayerState._fields):
                raise CheckpointError(f"the carried states of a checkpoint have a tensor '{name}'")
            fields.setdefault(int(lane), {}).setdefault(int(layer), {})[field] = tensor
        self._states = {
            lane: tuple(LayerState(**layers[layer]) for layer in sorted(layers))
            for lane, layers in fields.items()
            if lane in lanes
        }

    def forget(self) -> None:
        """Let go of all states, of which a bad step may have spoilt some: what is left of conversations begins anew."""
        self._states = {}

    def _begin(self, model: LanguageModel, batch: MicroBatch, context: SequenceContext) -> ModelState | None:
        comes = [] if batch.carry is None else [pair for pair in batch.carry.comes if pair[0] in self._states]
        if not comes:
            return None
        device = batch.tokens.device
        start = model.initial_state(count_sequences(context, len(batch.tokens)))
        sequences = torch.tensor([sequence for _, sequence in comes], device=device)
        return tuple(
            LayerState(
                *(
                    before.index_copy(
                        0,
                        sequences,
                        torch.cat([getattr(self._states[lane][layer], field) for lane, _ in comes]).to(
                            before
                        ),
                    )
                    for field, before in fresh._asdict().items()
                )
            )
            for layer, fresh in enumerate(start)
        )

    def _note(self, carry: Carry, after: ModelState) -> None:
        for lane, _ in carry.comes:
            self._states.pop(lane, None)
        for lane, sequence in carry.goes:
            ended = take_rows(after, [sequence])
            self._states[lane] = tuple(LayerState(*(x.detach() for x in layer)) for layer in ended)
