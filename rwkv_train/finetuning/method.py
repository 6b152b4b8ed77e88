"""A method takes hold of a model: what learns, what is stored of it, and in which files others find it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.adapter_note import AdapterNote
from rwkv_train.checkpoints.infer import expected_shapes
from rwkv_train.checkpoints.manifest import STATE_FILE, Shapes
from rwkv_train.checkpoints.states import save_official_state, why_not_official
from rwkv_train.config.methods import FreezeMethod, FullMethod, LoraMethod, Method, PrefixMethod, StateMethod
from rwkv_train.errors import CheckpointError
from rwkv_train.finetuning.adapter_files import write_adapter
from rwkv_train.finetuning.adapters import base_name, inject_adapter
from rwkv_train.finetuning.freezing import freeze
from rwkv_train.finetuning.states import export_start, learn_prefix, learn_state
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.state import save_state

OFFICIAL_STATE_FILE = "time_state.pth"
"""Name of the same state in the official form, where that has a place for it."""


def keeps_base(method: Method) -> bool:
    """Tell whether a method leaves the model's own parameters as they are, and learns others beside them."""
    return not isinstance(method, FullMethod | FreezeMethod)


def apply_method(
    model: LanguageModel,
    method: Method,
    encode: Callable[[str], Sequence[int]],
    seed: int,
    learned: Mapping[str, Tensor] | None = None,
) -> None:
    """Say what of a model learns, and give it what it needs for that.

    Args:
        model: with the weights to start from, quantized where the settings say so; it is changed. On the device "meta",
            which has shapes without values, what depends on values is not refused.
        method: the settings.
        encode: text -> ids of tokens.
        seed: of initial values.
        learned: the parameters beside the base that a run goes on with; ``None``: it begins.

    Raises:
        ConfigError: the method does not fit the model.
        CheckpointError: ``learned`` is of another method.
    """
    if isinstance(method, FreezeMethod):
        freeze(model, method)
    if not keeps_base(method):
        return
    assert isinstance(method, LoraMethod | StateMethod | PrefixMethod)
    if isinstance(method, LoraMethod):
        inject_adapter(model, method, seed, learned)
        return
    if isinstance(method, StateMethod):
        learn_state(model)
    else:
        learn_prefix(model, method, encode, seed)
    if learned is not None:
        wanted = own_shapes_of(model)
        if {name: tuple(tensor.shape) for name, tensor in learned.items()} != wanted:
            raise CheckpointError(
                f"a checkpoint of finetune.method {method.method!r} has {', '.join(sorted(wanted)[:3])} and so on; "
                f"this one has {', '.join(sorted(learned)[:3]) or 'nothing'}"
            )
        with torch.no_grad():
            for name, tensor in learned.items():
                model.get_parameter(name).copy_(tensor)


def own_shapes_of(model: LanguageModel) -> Shapes:
    """Return the shapes of the parameters that a model has beside those of its base."""
    base = expected_shapes(model.config)
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if base_name(name) not in base
    }


def write_learned(
    folder: Path, model: LanguageModel, method: Method, learned: Mapping[str, Tensor], note: AdapterNote
) -> None:
    """Write what was learned beside the base as other programs read it.

    LoRA: an adapter of peft. A state or prefix: our file of a state, and the official one where that has a place
    for it.

    Args:
        folder: of an unfinished checkpoint.
        model: the model.
        method: what it was trained with.
        learned: its own parameters, whole, in float32.
        note: what else is known.

    Raises:
        OSError: the disk refuses.
    """
    if isinstance(method, LoraMethod):
        write_adapter(folder, learned, method, note)
        return
    state = export_start(model, learned)
    save_state(folder / STATE_FILE, state, base=note.base)
    if why_not_official(state) is None:
        save_official_state(folder / OFFICIAL_STATE_FILE, state)
