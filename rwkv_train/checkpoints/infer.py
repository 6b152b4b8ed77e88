"""Sizes from weights: which architecture it is, how large, and whether every tensor is there.

Names and shapes are those of the published files. What weights do not say - ``ctx_len``, initial values -
gets the value that the published models of that version were trained with.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.checkpoints.descriptions import Json
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.config.load import check_model
from rwkv_train.config.model import ModelConfig, lora_ranks_by_rule
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.models.registry import build_model, unused_parameters

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""

_SUPPORTED = "RWKV-4, 5, 6 and 7 are supported"

_UNSUPPORTED = {
    ".rosa": "RWKV-8 (ROSA)",
    "ffn.enn.weight": "RWKV-8 (DeepEmbed)",
    "qkv.qq.weight": "RWKV-7b (attention beside the recurrence)",
    "ffn.s_emb.weight": "RWKV-7a (DeepEmbed)",
    "self_attn.": "a Transformer",
    "attn.c_attn.": "a Transformer",
    "attention.query_key_value": "a Transformer",
    "mixer.A_log": "a Mamba model",
}
"""Part of a tensor's name -> what holds such a tensor. The first match counts."""


_IN_HUGGING_FACE_FOLDERS = ("rwkv.blocks.", "attn.r_proj.")
"""Parts of names that tensors have in Hugging Face folders alone, whose config.json is needed too."""


class _Architecture(NamedTuple):
    marks: frozenset[str]
    """Tensors of a block that no older version has: one is enough, so that another may be found missing."""
    settings: Callable[[Shapes], Json]
    """The settings that shapes imply."""


def infer_config(
    tensors: Mapping[str, Tensor], *, ctx_len: int | None = None, source: str = "the weights"
) -> ModelConfig:
    """Return the architecture settings that a set of weights implies, having checked every tensor.

    Args:
        tensors: the official name -> tensor; of the tensors only the shapes are looked at.
        ctx_len: length of a training sample, which weights do not tell; ``None``: 1024 for RWKV-4, 4096 for
            later versions, as published.
        source: what messages call the weights, such as their path.

    Raises:
        CheckpointError: the architecture is not supported, or a tensor is missing, unknown or misshaped.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        settings = _recognize(shapes).settings(shapes)
        config = check_model(settings if ctx_len is None else {**settings, "ctx_len": ctx_len})
    except (_MisfitError, ConfigError) as problem:
        raise CheckpointError(f"{source}: {problem}") from None
    check_tensors(config, tensors, source=source)
    return config


def check_tensors(config: ModelConfig, tensors: Mapping[str, Tensor], *, source: str = "the weights") -> None:
    """Compare names and shapes with those of the model that ``config`` describes.

    Tensors that the architecture does not use (RWKV-7's value residual of the first block) may be absent.

    Raises:
        CheckpointError: it names the first tensor that is missing, unknown or misshaped, with both shapes.
    """
    expected = expected_shapes(config, source=source)
    unused = unused_parameters(config.arch)
    missing = [name for name in expected if name not in tensors and name not in unused]
    unknown = [name for name in tensors if name not in expected]
    model = f"{config.arch} with n_layer {config.n_layer} and n_embd {config.n_embd}"
    if missing:
        raise CheckpointError(
            f"{source}: tensor '{missing[0]}' is missing{_and_more(missing)}; {model} has it, with shape "
            f"{list(expected[missing[0]])}"
        )
    if unknown:
        name = unknown[0]
        raise CheckpointError(
            f"{source}: tensor '{name}' {list(tensors[name].shape)} is extra{_and_more(unknown)}; "
            f"{model} has no such tensor"
        )
    misshaped = [name for name, tensor in tensors.items() if tuple(tensor.shape) != expected[name]]
    if misshaped:
        name = misshaped[0]
        raise CheckpointError(
            f"{source}: tensor '{name}' has shape {list(tensors[name].shape)}{_and_more(misshaped)}; {model} "
            f"has {list(expected[name])}"
        )


def make_explicit(config: ModelConfig) -> ModelConfig:
    """Return ``config`` as it is stored beside weights: LoRA ranks as numbers, no ``init_from``."""
    return config.explicit()


def fill_unused(config: ModelConfig, tensors: Mapping[str, Tensor]) -> TensorSource:
    """Return all tensors of the model in its own order; unused ones that are absent become zeros.

    Args:
        config: settings that the tensors were checked against.
        tensors: name -> tensor. Zeros get the dtype of ``emb.weight``.
    """
    source, shapes = TensorSource.of(tensors), expected_shapes(config)
    dtype = source.headers["emb.weight"].dtype
    headers = {
        name: source.headers.get(name, torch.empty(shape, dtype=dtype, device="meta"))
        for name, shape in shapes.items()
    }
    return TensorSource(
        headers,
        lambda name: source[name] if name in source else torch.zeros(shapes[name], dtype=dtype),
    )


def expected_shapes(config: ModelConfig, *, source: str = "these settings") -> Shapes:
    """Return the name and shape of each tensor of a model, in its own order. Takes no memory for values.

    Args:
        config: settings of the model.
        source: what messages call that which describes it.

    Raises:
        CheckpointError: a tensor would have more values than can be counted.
    """
    try:
        return _shapes_of_model(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # a number is too large for PyTorch
        raise CheckpointError(f"{source}: this describes a model of impossible size") from error


@lru_cache(maxsize=8)
def _shapes_of_model(config: ModelConfig) -> Shapes:
    model = build_model(config, wkv_backend="reference", device="meta")
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class _MisfitError(Exception):
    """Why shapes make no model; becomes a CheckpointError that names the file."""


def _recognize(shapes: Shapes) -> _Architecture:
    if not shapes:
        raise _MisfitError("there is no tensor in it")
    if any(part in name for name in shapes for part in _IN_HUGGING_FACE_FOLDERS):
        raise _MisfitError("this is a file of a Hugging Face folder; give the folder, with its config.json")
    for part, what in _UNSUPPORTED.items():
        if any(part in name for name in shapes):
            raise _MisfitError(f"this is {what}, which is not supported; {_SUPPORTED}")
    in_blocks = {_in_block(name) for name in shapes}
    for architecture in _ARCHITECTURES:
        if architecture.marks & in_blocks:
            return architecture
    raise _MisfitError(f"this is no RWKV model (its first tensor is '{next(iter(shapes))}'); {_SUPPORTED}")


def _rwkv4(shapes: Shapes) -> Json:
    return {"arch": "rwkv4", **_frame(shapes), "ctx_len": 1_024}


def _rwkv5(shapes: Shapes) -> Json:
    frame = _frame(shapes)
    n_embd = frame["n_embd"]
    in_blocks = {_in_block(name) for name in shapes}
    decay = "blocks.0.att.time_decay"
    if len(shapes.get(decay, ())) == 1:
        n_head = shapes[decay][0]
        if n_head == 0 or n_embd % n_head:
            raise _MisfitError(
                f"tensor '{decay}' has shape {[n_head]}; n_embd ({n_embd}) must be a multiple of n_head"
            )
        head_size = n_embd // n_head
        version = "5.1" if {"att.gate.weight", "att.time_mix_g"} & in_blocks else "5.0"
        bonus = "time_first" if "att.time_first" in in_blocks else "time_faaaa"
    else:
        head_size = _head_size(shapes, decay, n_embd)
        version, bonus = "5.2", "time_faaaa"
    return {
        "arch": "rwkv5",
        **frame,
        "head_size": head_size,
        "ffn_width": _ffn_width(shapes),
        "version": version,
        "bonus": bonus,
    }


def _rwkv6(shapes: Shapes) -> Json:
    frame = _frame(shapes)
    _, shift_rank, _ = _shape(shapes, "blocks.0.att.time_maa_w2", ("5", "rank", "n_embd"))
    return {
        "arch": "rwkv6",
        **frame,
        "head_size": _head_size(shapes, "blocks.0.att.time_faaaa", frame["n_embd"]),
        "ffn_width": _ffn_width(shapes),
        "lora_ranks": {"shift": shift_rank, "decay": _rank(shapes, "blocks.0.att.time_decay_w1")},
    }


def _rwkv7(shapes: Shapes) -> Json:
    frame = _frame(shapes)
    return {
        "arch": "rwkv7",
        **frame,
        "head_size": _head_size(shapes, "blocks.0.att.r_k", frame["n_embd"]),
        "lora_ranks": {
            "w": _rank(shapes, "blocks.0.att.w1"),
            "a": _rank(shapes, "blocks.0.att.a1"),
            "v": _value_rank(shapes, frame["n_embd"]),
            "g": _rank(shapes, "blocks.0.att.g1"),
        },
    }


# Newest first. A new version is one line here and one function above.
_ARCHITECTURES = (
    _Architecture(frozenset({"att.r_k", "att.x_r", "att.w0", "ffn.x_k"}), _rwkv7),
    _Architecture(frozenset({"att.time_maa_x", "att.time_maa_w1", "ffn.time_maa_k"}), _rwkv6),
    _Architecture(frozenset({"att.ln_x.weight", "att.ln_x.bias", "att.time_faaaa"}), _rwkv5),
    _Architecture(frozenset({"att.time_first", "att.time_decay", "ffn.time_mix_k"}), _rwkv4),
)


def _frame(shapes: Shapes) -> Json:
    """What every version has."""
    vocab_size, n_embd = _shape(shapes, "emb.weight", ("vocab_size", "n_embd"))
    return {"n_layer": _n_layer(shapes), "n_embd": n_embd, "vocab_size": vocab_size, "ctx_len": 4_096}


def _in_block(name: str) -> str:
    """The name within its block; empty for what is in none."""
    match = re.match(r"blocks\.\d+\.", name)
    return name[match.end() :] if match else ""


def _head_size(shapes: Shapes, name: str, n_embd: int) -> int:
    n_head, head_size = _shape(shapes, name, ("n_head", "head_size"))
    if n_head * head_size != n_embd:
        raise _MisfitError(
            f"tensor '{name}' has shape {[n_head, head_size]}; n_head x head_size must be n_embd ({n_embd})"
        )
    return head_size


def _ffn_width(shapes: Shapes) -> int:
    return _shape(shapes, "blocks.0.ffn.key.weight", ("ffn_width", "n_embd"))[0]


def _value_rank(shapes: Shapes, n_embd: int) -> int:
    """Rank of the value residual: the second block uses it, the first one's may be absent."""
    for name in ("blocks.1.att.v1", "blocks.0.att.v1"):
        if name in shapes:
            return _rank(shapes, name)
    # One layer, and without its unused tensors: any rank is right, so the one of published models.
    return lora_ranks_by_rule(n_embd, "original").v


def _rank(shapes: Shapes, name: str) -> int:
    return _shape(shapes, name, ("n_embd", "rank"))[1]


def _shape(shapes: Shapes, name: str, sides: tuple[str, ...]) -> tuple[int, ...]:
    """The shape of a tensor whose sides are settings, which ``sides`` names for messages."""
    wanted = f"[{', '.join(sides)}]"
    if name not in shapes:
        raise _MisfitError(f"tensor '{name}' is missing; its shape {wanted} is needed")
    shape = shapes[name]
    if len(shape) != len(sides) or 0 in shape:
        raise _MisfitError(f"tensor '{name}' has shape {list(shape)}, expected {wanted}")
    return shape


def _n_layer(shapes: Shapes) -> int:
    """How many blocks there are: counted, so that a gap shows as missing tensors of the last ones."""
    return len({match[0] for name in shapes if (match := re.match(r"blocks\.\d+\.", name))})


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
