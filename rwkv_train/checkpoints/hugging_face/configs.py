"""``config.json`` of a Hugging Face folder: our settings from it, and it from our settings, one table a layout."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rwkv_train.checkpoints.descriptions import Json, parse_model, shortened
from rwkv_train.config.model import ModelConfig, Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv7Config
from rwkv_train.errors import CheckpointError

Headers = Mapping[str, Tensor]
"""A folder's tensor name -> a tensor of its shape, without values."""

EPSILON = 1e-5
"""Epsilon of the layer norms of every model."""

RWKV7_HEAD_EPSILON = 64e-5
"""Epsilon of RWKV-7's norm of heads, whatever their size."""


class Keys(NamedTuple):
    """What the class of a layout takes from ``config.json``."""

    fixed: Json
    """Keys that change the mathematics, with the value that our models have."""
    free: Json
    """Keys that do not change it, and sizes, with the values that the class gives them where they are absent."""
    describe: Callable[[Any], Json]
    """Gives the sizes, and what else depends on our settings."""
    settings: Callable[[Json, Headers], Json]
    """Gives our settings for a ``config.json`` that lacks no key, and the shapes of the tensors."""
    other_defaults: Json
    """Keys of ``fixed`` to which the class gives another value where they are absent."""


def describe_config(keys: Keys, config: ModelConfig, end_of_document: int) -> Json:
    """Return ``config.json`` for a model, without the names of its class and of its dtype.

    Args:
        keys: of the layout.
        config: settings of the model.
        end_of_document: token id with which a document ends, and before its first token.
    """
    ends = {"bos_token_id": end_of_document, "eos_token_id": end_of_document}
    return {**keys.free, **keys.fixed, **keys.describe(config), **ends}


def with_defaults(keys: Keys, content: Json) -> Json:
    """Return the content of a ``config.json`` with all that its class adds to it."""
    return {**keys.free, **keys.fixed, **keys.other_defaults, **content}


def parse_config(path: Path, keys: Keys, content: Json, headers: Headers) -> ModelConfig:
    """Return the settings of the model that a ``config.json`` describes.

    Args:
        path: of the file, for messages.
        keys: of the layout.
        content: of the file, with defaults.
        headers: of the tensors beside it, from which comes what the file does not tell.

    Raises:
        CheckpointError: a key has a value that no model of ours has.
    """
    for key, wanted in keys.fixed.items():
        if not _agree(content[key], wanted):
            found = shortened(repr(content[key]))
            raise CheckpointError(f"{path}: '{key}' is {found}; only {wanted!r} is supported")
    try:
        section = keys.settings(content, headers)
    except (TypeError, ValueError, ArithmeticError) as error:  # of numbers that are none, or are 0
        raise CheckpointError(f"{path} describes no model: {shortened(str(error), 200)}") from error
    except KeyError as error:
        raise CheckpointError(f"{path.parent}: tensor {error} is missing") from error
    return parse_model(path, section)


def residual_factor(content: Json) -> float:
    """Return the number by which a folder's residual stream is larger than ours; a power of two, 1 as a rule.

    flash-linear-attention has one epsilon (``norm_eps``) for all norms, and so has no place for that of RWKV-6's
    heads, 64 times larger. But a norm of s x with an epsilon of s^2 e is the norm of x with e: with ``norm_eps``
    of the heads and a residual stream 8 times larger the model is the same, and no bit of a weight is lost.

    Args:
        content: of a ``config.json``, with defaults.

    Raises:
        ValueError: it is none that keeps every bit.
    """
    epsilon = content.get("norm_eps", EPSILON)
    if isinstance(epsilon, int | float) and not isinstance(epsilon, bool) and 0 < epsilon < math.inf:
        factor = float(2 ** round(math.log2(epsilon / EPSILON) / 2))
        if factor >= 1 and math.isclose(epsilon, factor**2 * EPSILON, rel_tol=1e-6):
            return factor
    raise ValueError(
        f"norm_eps is {shortened(repr(epsilon))}; 1e-5 times 1, 4, 16, 64 ... can be read and written"
    )


def _agree(found: object, wanted: object) -> bool:
    if isinstance(found, float | int) and isinstance(wanted, float):
        return not isinstance(found, bool) and math.isclose(found, wanted, rel_tol=1e-6)
    return type(found) is type(wanted) and found == wanted


def _describe_rwkv4(config: Rwkv4Config) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.ctx_len,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "attention_hidden_size": config.n_embd,
        "intermediate_size": config.ffn_width,
    }


def _rwkv4_settings(content: Json, headers: Headers) -> Json:
    return {"arch": "rwkv4", **_frame_settings(content), "ctx_len": content["context_length"]}


def _describe_remote(config: Rwkv5Config | Rwkv6Config) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.ctx_len,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "attention_hidden_size": config.n_embd,
        "intermediate_size": config.ffn_width,
        "head_size": config.head_size,
        "head_size_divisor": config.head_size_divisor,
    }


def _remote_settings(content: Json, headers: Headers) -> Json:
    return {
        **_frame_settings(content),
        "ctx_len": content["context_length"],
        "head_size": content["head_size"],
        "head_size_divisor": float(content["head_size_divisor"]),
        # Published files say null, and the classes compute it; the weights know.
        "ffn_width": _size(headers, "rwkv.blocks.0.feed_forward.key.weight", 0),
    }


def _rwkv5_remote_settings(content: Json, headers: Headers) -> Json:
    attention = "rwkv.blocks.0.attention"
    if len(headers[f"{attention}.time_decay"].shape) == 2:
        version = "5.2"
    else:
        version = "5.1" if f"{attention}.gate.weight" in headers else "5.0"
    bonus = "time_first" if f"{attention}.time_first" in headers else "time_faaaa"
    return {"arch": "rwkv5", **_remote_settings(content, headers), "version": version, "bonus": bonus}


def _rwkv6_remote_settings(content: Json, headers: Headers) -> Json:
    attention = "rwkv.blocks.0.attention"
    ranks = {
        "shift": _size(headers, f"{attention}.time_maa_w2", 1),
        "decay": _size(headers, f"{attention}.time_decay_w1", 1),
    }
    return {"arch": "rwkv6", **_remote_settings(content, headers), "lora_ranks": ranks}


def _describe_rwkv6_fla(config: Rwkv6Config) -> Json:
    return {
        "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.n_layer,
        "num_heads": config.n_head,
        "proj_low_rank_dim": config.lora_ranks.shift,
        "gate_low_rank_dim": config.lora_ranks.decay,
        "max_position_embeddings": config.ctx_len,
        "norm_eps": EPSILON * config.head_size_divisor**2,
        "vocab_size": config.vocab_size,
    }


def _rwkv6_fla_settings(content: Json, headers: Headers) -> Json:
    if content["hidden_size"] % content["num_heads"]:
        raise ValueError(
            f"num_heads ({content['num_heads']}) must divide hidden_size ({content['hidden_size']})"
        )
    return {
        "arch": "rwkv6",
        **_frame_settings(content),
        "ctx_len": content["max_position_embeddings"],
        "head_size": content["hidden_size"] // content["num_heads"],
        "head_size_divisor": residual_factor(content),
        # Where it is null, the class rounds up what others round down; the weights know.
        "ffn_width": _size(headers, "model.layers.0.ffn.key.linear.weight", 0),
        "lora_ranks": {"shift": content["proj_low_rank_dim"], "decay": content["gate_low_rank_dim"]},
    }


def _describe_rwkv7_fla(config: Rwkv7Config) -> Json:
    return {
        "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.n_layer,
        "head_dim": config.head_size,
        "num_heads": config.n_head,
        "decay_low_rank_dim": config.ranks.w,
        "gate_low_rank_dim": config.ranks.g,
        "a_low_rank_dim": config.ranks.a,
        "v_low_rank_dim": config.ranks.v,
        "max_position_embeddings": config.ctx_len,
        # The class multiplies it by head_dim for the norm of heads.
        "norm_eps": RWKV7_HEAD_EPSILON / config.head_size,
        "vocab_size": config.vocab_size,
        "value_dim": [config.n_embd] * config.n_layer,
    }


def _rwkv7_fla_settings(content: Json, headers: Headers) -> Json:
    head_size = content["head_dim"] or content["hidden_size"] // content["num_heads"]
    head_epsilon = head_size * content["norm_eps"]
    if not math.isclose(head_epsilon, RWKV7_HEAD_EPSILON, rel_tol=1e-6):
        raise ValueError(
            f"head_dim ({head_size}) times norm_eps ({content['norm_eps']}) is {head_epsilon:g}, the epsilon of the "
            f"norm of heads, and must be {RWKV7_HEAD_EPSILON:g}"
        )
    return {
        "arch": "rwkv7",
        **_frame_settings(content),
        "ctx_len": content["max_position_embeddings"],
        "head_size": head_size,
        "lora_ranks": {
            "w": content["decay_low_rank_dim"],
            "a": content["a_low_rank_dim"],
            "v": content["v_low_rank_dim"],
            "g": content["gate_low_rank_dim"],
        },
    }


def _frame_settings(content: Json) -> Json:
    return {
        "n_layer": content["num_hidden_layers"],
        "n_embd": content["hidden_size"],
        "vocab_size": content["vocab_size"],
    }


def _size(headers: Headers, name: str, dimension: int) -> int:
    shape = headers[name].shape
    if len(shape) <= dimension:
        raise ValueError(f"tensor '{name}' has shape {list(shape)}")
    return shape[dimension]


RWKV4_TRANSFORMERS = Keys(
    fixed={"layer_norm_epsilon": EPSILON, "tie_word_embeddings": False},
    free={
        "vocab_size": 50_277,
        "context_length": 1_024,
        "hidden_size": 4_096,
        "num_hidden_layers": 32,
        "rescale_every": 6,
        "use_cache": True,
    },
    describe=_describe_rwkv4,
    settings=_rwkv4_settings,
    other_defaults={},
)

_REMOTE_FREE = {
    "vocab_size": 65_536,
    "context_length": 4_096,
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "head_size": 64,
    "head_size_divisor": 8,
    "rescale_every": 6,
    "use_cache": True,
}

RWKV5_REMOTE = RWKV4_TRANSFORMERS._replace(
    free=_REMOTE_FREE, describe=_describe_remote, settings=_rwkv5_remote_settings
)

RWKV6_REMOTE = RWKV5_REMOTE._replace(settings=_rwkv6_remote_settings)

_FLA_FIXED = {
    "norm_first": True,
    "norm_bias": True,
    "hidden_act": "sqrelu",
    "attn": None,
    "tie_word_embeddings": False,
}

_FLA_FREE = {
    "vocab_size": 32_000,
    "hidden_size": 2_048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 2_048,
    "norm_eps": EPSILON,
    "attn_mode": "chunk",
    "use_cache": True,
    "pad_token_id": None,
    "initializer_range": 0.02,
    "fuse_norm": True,
    "fuse_cross_entropy": True,
    "fuse_linear_cross_entropy": False,
}

RWKV6_FLA = Keys(
    fixed={**_FLA_FIXED, "expand_k": 1.0, "expand_v": 1.0},
    free={
        **_FLA_FREE,
        "num_heads": 4,
        "proj_low_rank_dim": 32,
        "gate_low_rank_dim": 64,
        "hidden_ratio": 3.5,
        "use_l2warp": False,
    },
    describe=_describe_rwkv6_fla,
    settings=_rwkv6_fla_settings,
    other_defaults={"expand_k": 0.5},
)

RWKV7_FLA = Keys(
    fixed=_FLA_FIXED,
    free={
        **_FLA_FREE,
        "head_dim": 64,
        "num_heads": None,
        "decay_low_rank_dim": 64,
        "gate_low_rank_dim": 128,
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 16,
        "hidden_ratio": 4,
        "use_l2warp": True,
    },
    describe=_describe_rwkv7_fla,
    settings=_rwkv7_fla_settings,
    other_defaults={},
)
