"""Names of tensors in Hugging Face folders beside the official ones, one table a layout; ``*`` is the layer.

Source: transformers 5.23 (``RwkvForCausalLM``), flash-linear-attention 0.6 (``RWKV6ForCausalLM``,
``RWKV7ForCausalLM``), and the code in the repositories of https://huggingface.co/RWKV (``Rwkv5ForCausalLM``,
``Rwkv6ForCausalLM``).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rwkv_train.checkpoints.hugging_face.changes import (
    FLAT,
    SAME,
    SHIFT_DOWN,
    SHIFT_UP,
    STACKED,
    TRANSPOSED,
    Change,
)


class Row(NamedTuple):
    """One tensor of a folder."""

    theirs: str
    """Its name there."""
    ours: tuple[str, ...]
    """Official names of the tensors that it is made of."""
    change: Change = SAME
    """How it is made."""

    def of_layer(self, layer: int) -> "Row":
        """Return the row with ``*`` replaced."""
        names = tuple(name.replace("*", str(layer)) for name in self.ours)
        return Row(self.theirs.replace("*", str(layer)), names, self.change)


Rows = tuple[Row, ...]


def _rows(names: Mapping[str, str], change: Change = SAME) -> Iterator[Row]:
    for theirs, ours in names.items():
        yield Row(theirs, (ours,), change)


_RWKV_FRAME = {
    "rwkv.embeddings.weight": "emb.weight",
    "rwkv.blocks.0.pre_ln.weight": "blocks.0.ln0.weight",
    "rwkv.blocks.0.pre_ln.bias": "blocks.0.ln0.bias",
    "rwkv.blocks.*.ln1.weight": "blocks.*.ln1.weight",
    "rwkv.blocks.*.ln1.bias": "blocks.*.ln1.bias",
    "rwkv.blocks.*.ln2.weight": "blocks.*.ln2.weight",
    "rwkv.blocks.*.ln2.bias": "blocks.*.ln2.bias",
    "rwkv.blocks.*.attention.key.weight": "blocks.*.att.key.weight",
    "rwkv.blocks.*.attention.value.weight": "blocks.*.att.value.weight",
    "rwkv.blocks.*.attention.receptance.weight": "blocks.*.att.receptance.weight",
    "rwkv.blocks.*.attention.output.weight": "blocks.*.att.output.weight",
    "rwkv.blocks.*.feed_forward.key.weight": "blocks.*.ffn.key.weight",
    "rwkv.blocks.*.feed_forward.receptance.weight": "blocks.*.ffn.receptance.weight",
    "rwkv.blocks.*.feed_forward.value.weight": "blocks.*.ffn.value.weight",
    "rwkv.ln_out.weight": "ln_out.weight",
    "rwkv.ln_out.bias": "ln_out.bias",
    "head.weight": "head.weight",
}
"""What RWKV-4 to RWKV-6 share in the layouts that begin with ``rwkv.``."""

_STATIC_MIX = {
    "rwkv.blocks.*.attention.time_mix_key": "blocks.*.att.time_mix_k",
    "rwkv.blocks.*.attention.time_mix_value": "blocks.*.att.time_mix_v",
    "rwkv.blocks.*.attention.time_mix_receptance": "blocks.*.att.time_mix_r",
    "rwkv.blocks.*.feed_forward.time_mix_key": "blocks.*.ffn.time_mix_k",
    "rwkv.blocks.*.feed_forward.time_mix_receptance": "blocks.*.ffn.time_mix_r",
    "rwkv.blocks.*.attention.time_decay": "blocks.*.att.time_decay",
    "rwkv.blocks.*.attention.time_first": "blocks.*.att.time_first",
}
"""What RWKV-4 and RWKV-5 share beside the frame."""

_GATED_HEADS = {
    "rwkv.blocks.*.attention.gate.weight": "blocks.*.att.gate.weight",
    "rwkv.blocks.*.attention.ln_x.weight": "blocks.*.att.ln_x.weight",
    "rwkv.blocks.*.attention.ln_x.bias": "blocks.*.att.ln_x.bias",
    "rwkv.blocks.*.attention.time_faaaa": "blocks.*.att.time_faaaa",
}
"""What RWKV-5 and RWKV-6 share beside the frame."""

RWKV4_TRANSFORMERS: Rows = tuple(_rows(_RWKV_FRAME | _STATIC_MIX))

RWKV5_REMOTE: Rows = tuple(
    _rows(
        _RWKV_FRAME
        | _STATIC_MIX
        | _GATED_HEADS
        | {"rwkv.blocks.*.attention.time_mix_gate": "blocks.*.att.time_mix_g"}
    )
)

RWKV6_REMOTE: Rows = tuple(
    _rows(
        _RWKV_FRAME
        | _GATED_HEADS
        | {
            f"rwkv.blocks.*.attention.{name}": f"blocks.*.att.{name}"
            for name in (
                *(f"time_maa_{mix}" for mix in "xwkvrg"),
                "time_maa_w1",
                "time_maa_w2",
                "time_decay",
                "time_decay_w1",
                "time_decay_w2",
            )
        }
        | {f"rwkv.blocks.*.feed_forward.time_maa_{mix}": f"blocks.*.ffn.time_maa_{mix}" for mix in "kr"}
    )
)

_FLA_FRAME = {
    "model.embeddings.weight": "emb.weight",
    "model.layers.0.pre_norm.weight": "blocks.0.ln0.weight",
    "model.layers.0.pre_norm.bias": "blocks.0.ln0.bias",
    "model.layers.*.attn_norm.weight": "blocks.*.ln1.weight",
    "model.layers.*.attn_norm.bias": "blocks.*.ln1.bias",
    "model.layers.*.ffn_norm.weight": "blocks.*.ln2.weight",
    "model.layers.*.ffn_norm.bias": "blocks.*.ln2.bias",
    "model.layers.*.attn.g_norm.weight": "blocks.*.att.ln_x.weight",
    "model.layers.*.attn.g_norm.bias": "blocks.*.att.ln_x.bias",
    "model.layers.*.attn.o_proj.weight": "blocks.*.att.output.weight",
    "model.layers.*.ffn.value.weight": "blocks.*.ffn.value.weight",
    "model.norm.weight": "ln_out.weight",
    "model.norm.bias": "ln_out.bias",
    "lm_head.weight": "head.weight",
}
"""What RWKV-6 and RWKV-7 share in the layouts of flash-linear-attention."""

RWKV6_FLA: Rows = (
    *_rows(
        _FLA_FRAME
        | {
            "model.layers.*.attn.bonus": "blocks.*.att.time_faaaa",
            "model.layers.*.attn.r_proj.linear.weight": "blocks.*.att.receptance.weight",
            "model.layers.*.attn.k_proj.linear.weight": "blocks.*.att.key.weight",
            "model.layers.*.attn.v_proj.linear.weight": "blocks.*.att.value.weight",
            "model.layers.*.attn.g_proj.linear.weight": "blocks.*.att.gate.weight",
            "model.layers.*.ffn.key.linear.weight": "blocks.*.ffn.key.weight",
            "model.layers.*.ffn.receptance.linear.weight": "blocks.*.ffn.receptance.weight",
        }
    ),
    *_rows(
        {
            "model.layers.*.attn.w_proj.linear.lora.0.weight": "blocks.*.att.time_decay_w1",
            "model.layers.*.attn.w_proj.linear.lora.2.weight": "blocks.*.att.time_decay_w2",
        },
        TRANSPOSED,
    ),
    *_rows(
        {
            "model.layers.*.attn.w_proj.linear.lora.2.bias": "blocks.*.att.time_decay",
            "model.layers.*.attn.x_proj.0.mu": "blocks.*.att.time_maa_x",
            "model.layers.*.ffn.key.mu": "blocks.*.ffn.time_maa_k",
            "model.layers.*.ffn.receptance.mu": "blocks.*.ffn.time_maa_r",
        },
        FLAT,
    ),
    Row("model.layers.*.attn.x_proj.0.linear.weight", ("blocks.*.att.time_maa_w1",), SHIFT_DOWN),
    Row("model.layers.*.attn.x_proj.2.weight", ("blocks.*.att.time_maa_w2",), SHIFT_UP),
    Row("model.layers.*.attn.x_bias", tuple(f"blocks.*.att.time_maa_{mix}" for mix in "rwkvg"), STACKED),
)

_RWKV7_FLA_WITHOUT_MIXES: Rows = (
    *_rows(
        _FLA_FRAME
        | {
            "model.layers.*.attn.r_k": "blocks.*.att.r_k",
            "model.layers.*.attn.r_proj.weight": "blocks.*.att.receptance.weight",
            "model.layers.*.attn.k_proj.weight": "blocks.*.att.key.weight",
            "model.layers.*.attn.v_proj.weight": "blocks.*.att.value.weight",
            "model.layers.*.ffn.key.weight": "blocks.*.ffn.key.weight",
        }
    ),
    *_rows(
        {f"model.layers.*.attn.{pair}_lora.lora.0.weight": f"blocks.*.att.{pair}1" for pair in "wavg"}
        | {f"model.layers.*.attn.{pair}_lora.lora.2.weight": f"blocks.*.att.{pair}2" for pair in "wavg"},
        TRANSPOSED,
    ),
    *_rows(
        {f"model.layers.*.attn.{pair}_lora.lora.2.bias": f"blocks.*.att.{pair}0" for pair in "wav"}
        | {
            "model.layers.*.attn.k_k": "blocks.*.att.k_k",
            "model.layers.*.attn.k_a": "blocks.*.att.k_a",
            "model.layers.*.ffn.x_k": "blocks.*.ffn.x_k",
        },
        FLAT,
    ),
)

RWKV7_FLA: Rows = (
    *_rows({f"model.layers.*.attn.x_{mix}": f"blocks.*.att.x_{mix}" for mix in "rwkvag"}),
    *_RWKV7_FLA_WITHOUT_MIXES,
)

RWKV7_FLA_OF_EARLY_2025: Rows = (
    Row("model.layers.*.attn.x_x", tuple(f"blocks.*.att.x_{mix}" for mix in "rwkvag"), STACKED),
    *_RWKV7_FLA_WITHOUT_MIXES,
)
"""The six mixes of a layer in one tensor, as the first folders of flash-linear-attention have them."""

RESIDUAL_STREAM = frozenset(
    {
        "emb.weight",
        "blocks.0.ln0.weight",
        "blocks.0.ln0.bias",
        "blocks.*.att.output.weight",
        "blocks.*.ffn.value.weight",
    }
)
"""What makes the residual stream: these tensors times s, and every epsilon times s squared, is the same model."""


def expand(rows: Rows, names: Mapping[str, object], n_layer: int) -> list[Row]:
    """Return the rows of a model, layer by layer, with ``*`` replaced.

    Args:
        rows: a table of this file.
        names: the official names of the tensors that the model has; rows of others are left out.
        n_layer: number of layers.
    """
    before = [row for row in rows if "*" not in row.theirs and row.ours[0].startswith(("emb", "blocks"))]
    layers = [row.of_layer(layer) for layer in range(n_layer) for row in rows if "*" in row.theirs]
    after = [row for row in rows if "*" not in row.theirs and row not in before]
    return [row for row in (*before, *layers, *after) if all(name in names for name in row.ours)]


def makes_residual_stream(name: str) -> bool:
    """Tell whether an official tensor is one of :data:`RESIDUAL_STREAM`."""
    block, _layer, *rest = name.split(".")
    return name in RESIDUAL_STREAM or ".".join((block, "*", *rest)) in RESIDUAL_STREAM
