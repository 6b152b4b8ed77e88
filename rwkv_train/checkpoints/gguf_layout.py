"""Where each weight of RWKV-6 and RWKV-7 goes in a GGUF file for llama.cpp, as tables.

GGUF names and metadata are those of llama.cpp, whose converter (``conversion/rwkv.py``, 2026-10) and loader
(``src/models/rwkv6.cpp``, ``rwkv7.cpp``) define the format. Shapes here are row-major; ggml and its tools print
them the other way round.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.config.model import ModelConfig, Rwkv6Config, Rwkv7Config
from rwkv_train.errors import CheckpointError

Transform = Callable[[Sequence[Tensor]], Tensor]
"""Makes one tensor of a GGUF file from those of a model, of which it changes none."""

# llama.cpp reads the epsilon of the other norms from the file; that of the heads is fixed in it: 1e-5 * 8**2.
_HEAD_SIZE_DIVISOR = 8.0

# Its CUDA kernels stop at another head size; its CPU kernel of RWKV-7 reads past the end of smaller heads.
_HEAD_SIZES = (64, 128)


class GgufTensor(NamedTuple):
    """One tensor of a GGUF file."""

    name: str
    """Its name there."""
    sources: tuple[str, ...]
    """Official names of what it is made from."""
    transform: Transform
    """How it is made from them."""
    is_matrix: bool
    """Whether it is stored in the type that was asked for; all others are float32."""
    divisor: int = 1
    """What its values are divided by, a power of two."""


def gguf_tensors(config: ModelConfig, rescale_every: int = 0) -> list[GgufTensor]:
    """Return the tensors of the GGUF file of a model, in their order.

    Args:
        config: its settings.
        rescale_every: llama.cpp halves the residual stream after each so many layers of an RWKV-6, so that
            float16 does not overflow, and wants what later layers add to it divided accordingly; 0: never.
            Without effect for RWKV-7, which llama.cpp does not rescale.

    Raises:
        CheckpointError: llama.cpp has no such architecture, or none with these settings.
    """
    blocks = _BLOCKS.get(config.arch)
    if blocks is None:
        raise CheckpointError(
            f"llama.cpp has no {config.arch.upper().replace('RWKV', 'RWKV-')}, so there is no GGUF file of it; "
            "RWKV-6 and RWKV-7 can be written"
        )
    if config.head_size not in _HEAD_SIZES:
        raise CheckpointError(
            f"head_size ({config.head_size}) must be 64 or 128 for a GGUF file: llama.cpp's kernels are made for "
            "these, and compute wrong numbers with others"
        )
    if isinstance(config, Rwkv6Config) and config.head_size_divisor != _HEAD_SIZE_DIVISOR:
        raise CheckpointError(
            f"head_size_divisor ({config.head_size_divisor:g}) must be {_HEAD_SIZE_DIVISOR:g} for a GGUF file: "
            "llama.cpp has no other epsilon for the norm of the heads"
        )
    tensors = list(_EMBEDDING)
    for layer in range(config.n_layer):
        halvings = layer // rescale_every if rescale_every and config.arch == "rwkv6" else 0
        for tensor in (*_BLOCK, *blocks):
            divisor = 2**halvings if tensor.name in _RESIDUAL_OUTPUTS else 1
            tensors.append(_in_block(tensor, layer)._replace(divisor=divisor))
    return [*tensors, *_HEAD]


def gguf_metadata(config: ModelConfig, rescale_every: int = 0) -> dict[str, int | float]:
    """Return what a GGUF file says of the model's sizes: key -> unsigned 32-bit integer or float32.

    Args:
        config: settings of an RWKV-6 or RWKV-7.
        rescale_every: as for :func:`gguf_tensors`.
    """
    sizes: dict[str, int | float] = {
        "context_length": 1 << 20,  # as llama.cpp's converter says it: the model has no limit
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.ffn_width,
        "attention.head_count": 0,  # read but not used
        "attention.layer_norm_epsilon": 1e-5,
    }
    if isinstance(config, Rwkv6Config):
        sizes |= {
            "wkv.head_size": config.head_size,
            "rescale_every_n_layers": rescale_every,
            "time_mix_extra_dim": config.lora_ranks.shift,
            "time_decay_extra_dim": config.lora_ranks.decay,
        }
    elif isinstance(config, Rwkv7Config):
        sizes |= {
            "wkv.head_size": config.head_size,
            "attention.decay_lora_rank": config.ranks.w,
            "attention.iclr_lora_rank": config.ranks.a,
            "attention.value_residual_mix_lora_rank": config.ranks.v,
            "attention.gate_lora_rank": config.ranks.g,
        }
    return {f"{config.arch}.{key}": value for key, value in sizes.items()}


def _as_it_is(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].flatten()


def _transposed(tensors: Sequence[Tensor]) -> Tensor:
    """Official low-rank factors are ``[in, out]``, ggml wants ``[out, in]``."""
    return tensors[0].mT


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Vectors of C numbers as ``[number of vectors, 1, 1, C]``."""
    return torch.stack([tensor.reshape(1, 1, -1) for tensor in tensors])


def _matrix(name: str, source: str) -> GgufTensor:
    return GgufTensor(f"{name}.weight", (f"{source}.weight",), _as_it_is, is_matrix=True)


def _norm(name: str, source: str) -> tuple[GgufTensor, ...]:
    return tuple(
        GgufTensor(f"{name}.{part}", (f"{source}.{part}",), _as_it_is, is_matrix=False)
        for part in ("weight", "bias")
    )


def _small(transform: Transform, names: Mapping[str, str]) -> tuple[GgufTensor, ...]:
    """Tensors that are always float32. llama.cpp's quantizer leaves the same ones as they are."""
    return tuple(
        GgufTensor(f"{name}.weight", tuple(sources.split()), transform, is_matrix=False)
        for name, sources in names.items()
    )


_EMBEDDING = (_matrix("token_embd", "emb"), *_norm("token_embd_norm", "blocks.0.ln0"))

_HEAD = (*_norm("output_norm", "ln_out"), _matrix("output", "head"))

# Names within a block: "attn_norm" is blk.N.attn_norm, "ln1" is blocks.N.ln1.
_BLOCK = (
    *_norm("attn_norm", "ln1"),
    *_norm("attn_norm_2", "ln2"),
    _matrix("time_mix_receptance", "att.receptance"),
    _matrix("time_mix_key", "att.key"),
    _matrix("time_mix_value", "att.value"),
    _matrix("time_mix_output", "att.output"),
    *_norm("time_mix_ln", "att.ln_x"),
    _matrix("channel_mix_key", "ffn.key"),
    _matrix("channel_mix_value", "ffn.value"),
)

_RESIDUAL_OUTPUTS = {"time_mix_output.weight", "channel_mix_value.weight"}

_RWKV6_BLOCK = (
    _matrix("time_mix_gate", "att.gate"),
    _matrix("channel_mix_receptance", "ffn.receptance"),
    *_small(
        _stacked,
        {
            "time_mix_lerp_fused": "att.time_maa_w att.time_maa_k att.time_maa_v att.time_maa_r att.time_maa_g",
        },
    ),
    *_small(
        _flat,
        {
            "time_mix_lerp_x": "att.time_maa_x",
            "time_mix_decay": "att.time_decay",
            "channel_mix_lerp_k": "ffn.time_maa_k",
            "channel_mix_lerp_r": "ffn.time_maa_r",
        },
    ),
    *_small(
        _transposed,
        {
            "time_mix_w1": "att.time_maa_w1",
            "time_mix_w2": "att.time_maa_w2",
            "time_mix_decay_w1": "att.time_decay_w1",
            "time_mix_decay_w2": "att.time_decay_w2",
        },
    ),
    *_small(_as_it_is, {"time_mix_first": "att.time_faaaa"}),
)

_RWKV7_BLOCK = (
    *_small(_stacked, {"time_mix_lerp_fused": "att.x_r att.x_w att.x_k att.x_v att.x_a att.x_g"}),
    *_small(_flat, {"channel_mix_lerp_k": "ffn.x_k"}),
    *_small(_flat, {f"time_mix_{name}": f"att.{name}" for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")}),
    *_small(_transposed, {f"time_mix_{name}{i}": f"att.{name}{i}" for name in "wavg" for i in (1, 2)}),
)

_BLOCKS: Mapping[str, tuple[GgufTensor, ...]] = {"rwkv6": _RWKV6_BLOCK, "rwkv7": _RWKV7_BLOCK}

# llama.cpp wants a value residual in the first block of RWKV-7, of the shape of a0, a1 and a2, and ignores it.
_STAND_INS = {f"blocks.0.att.v{i}": f"blocks.0.att.a{i}" for i in (0, 1, 2)}


def _in_block(tensor: GgufTensor, layer: int) -> GgufTensor:
    sources = (f"blocks.{layer}.{source}" for source in tensor.sources)
    return tensor._replace(
        name=f"blk.{layer}.{tensor.name}",
        sources=tuple(_STAND_INS.get(source, source) for source in sources),
    )
