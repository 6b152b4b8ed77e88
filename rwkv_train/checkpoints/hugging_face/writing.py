"""Tensors and ``config.json`` of a Hugging Face folder, made of a model of ours."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.checkpoints.descriptions import Json
from rwkv_train.checkpoints.hugging_face.configs import describe_config, residual_factor
from rwkv_train.checkpoints.hugging_face.layouts import WRITTEN, Layout, LayoutName
from rwkv_train.checkpoints.hugging_face.names import Row, expand, makes_residual_stream
from rwkv_train.checkpoints.hugging_face.scaling import multiplied
from rwkv_train.checkpoints.tensor_source import TensorSource, header_of
from rwkv_train.config.model import ModelConfig
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import unused_parameters


class HfLayout(NamedTuple):
    """What goes into a Hugging Face folder, beside the files of its tokenizer."""

    tensors: TensorSource
    """Their name -> tensor, contiguous, made when it is asked for."""
    config_json: Json
    """Content of ``config.json``."""
    title: str
    """What the layout is called."""


def hugging_face_layout(
    config: ModelConfig, tensors: Mapping[str, Tensor], to: LayoutName = "hf", *, end_of_document: int = 0
) -> HfLayout:
    """Lay out a model as Hugging Face's libraries want it.

    Args:
        config: settings of the model.
        tensors: the official name -> tensor, all that the model has, in the dtype to be written; RWKV-7's unused
            ones have no place in the layout and are left out.
        to: which layout, see :data:`LayoutName`.
        end_of_document: token id that ends a document.

    Raises:
        CheckpointError: there is no such layout of this architecture, or it has no place for a setting.
    """
    layout = _choose(config, to)
    source = TensorSource.of(tensors)
    config_json = describe_config(layout.keys, config, end_of_document)
    try:
        factor = residual_factor(config_json)
    except ValueError as error:
        raise CheckpointError(_no_place(config, layout)) from error
    unused = unused_parameters(config.arch)
    ours = {name: header for name, header in source.headers.items() if name not in unused}
    rows = {row.theirs: row for row in expand(layout.rows, ours, config.n_layer)}
    assert ours.keys() == {name for row in rows.values() for name in row.ours}, (
        "a tensor without a name there"
    )

    def make(theirs: str) -> Tensor:
        row = rows[theirs]
        made = row.change.write([source[name] for name in row.ours]).contiguous()
        if factor != 1 and makes_residual_stream(row.ours[0]):
            return multiplied(f"tensor '{row.ours[0]}'", made, factor)
        return made

    headers = {theirs: _header(row, ours) for theirs, row in rows.items()}
    names = {"architectures": [layout.architecture], "model_type": layout.model_type}
    return HfLayout(
        TensorSource(headers, make),
        {**names, **config_json, **_precision(config_json, headers)},
        layout.title,
    )


def _choose(config: ModelConfig, to: LayoutName) -> Layout:
    if config.arch not in WRITTEN[to]:
        known = ", ".join(layout.title.split(" ", 1)[0] for layout in WRITTEN[to].values())
        raise CheckpointError(f"format '{to}' is for {known}, and the model is {config.arch}; choose 'hf'")
    return WRITTEN[to][config.arch]


def _no_place(config: ModelConfig, layout: Layout) -> str:
    setting, wanted = (
        ("head_size_divisor", "1, 2, 4, 8 ...") if config.arch == "rwkv6" else ("head_size", "64, 16 or 4")
    )
    return (
        f"{layout.title} has one epsilon for all norms, in which a {setting} of {getattr(config, setting):g} has no "
        f"place: it must be {wanted}; choose another format"
    )


def _header(row: Row, ours: Mapping[str, Tensor]) -> Tensor:
    dtypes = {ours[name].dtype for name in row.ours}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"tensors '{row.ours[0]}' to '{row.ours[-1]}' have different dtypes and become one tensor; choose one dtype"
        )
    return header_of(row.change.write([ours[name] for name in row.ours]))


def _precision(config_json: Json, headers: Mapping[str, Tensor]) -> Json:
    """What depends on the dtypes of the tensors.

    With ``rescale_every`` a class halves the residual stream after so many layers, lest float16 overflow, and
    divides weights in place for it. That makes the epsilons of norms larger, so only float16 gets it.
    """
    dtypes = {header.dtype for header in headers.values()}
    found: Json = {}
    if "rescale_every" in config_json and torch.float16 not in dtypes:
        found["rescale_every"] = 0
    if len(dtypes) == 1:
        found["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    return found
