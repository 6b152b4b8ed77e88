"""A model from a Hugging Face folder, under the official names and in the official shapes."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.checkpoints.descriptions import Json, read_json, shortened
from rwkv_train.checkpoints.hugging_face.configs import parse_config, residual_factor, with_defaults
from rwkv_train.checkpoints.hugging_face.layouts import READ, Layout
from rwkv_train.checkpoints.hugging_face.names import Row, expand, makes_residual_stream
from rwkv_train.checkpoints.hugging_face.scaling import divided
from rwkv_train.checkpoints.hugging_face.weight_files import open_weight_files
from rwkv_train.checkpoints.infer import expected_shapes
from rwkv_train.checkpoints.tensor_source import TensorSource, header_of
from rwkv_train.config.model import ModelConfig
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import unused_parameters


class HfModel(NamedTuple):
    """What a Hugging Face folder holds."""

    config: ModelConfig
    """Settings of the model."""
    tensors: TensorSource
    """Official name -> tensor, in the model's own order; RWKV-7's unused ones are not among them."""
    layout: str
    """What the layout is called."""


def read_hugging_face(folder: Path) -> HfModel:
    """Read an RWKV model of transformers, flash-linear-attention or the ``RWKV/`` repositories.

    Tensors are read when they are asked for. ``config.json`` is believed, and names and shapes of tensors are
    compared with what it asks for; its sizes that the weights know better are taken from them.

    Raises:
        CheckpointError: it is no such model, a setting is none that our models have, or a tensor is missing,
            unknown or misshaped.
    """
    path = folder / "config.json"
    content = read_json(path)
    theirs = open_weight_files(folder)
    layout = _recognize(folder, content, theirs)
    content = with_defaults(layout.keys, content)
    config = parse_config(path, layout.keys, content, theirs.headers)
    shapes = _shapes(path, config)
    rows = expand(layout.rows, shapes, config.n_layer)
    _check_headers(folder, layout, config, theirs.headers, _their_headers(rows, shapes))
    places = {name: (row, place) for row in rows for place, name in enumerate(row.ours)}
    factor = _residual_factor(path, layout, content)

    def read(name: str) -> Tensor:
        row, place = places[name]
        ours = row.change.read(theirs[row.theirs], place).contiguous()
        if factor != 1 and makes_residual_stream(name):
            return divided(f"{folder}: tensor '{row.theirs}'", ours, factor)
        return ours

    headers = {
        name: header_of(row.change.read(theirs.headers[row.theirs], place))
        for name, (row, place) in ((name, places[name]) for name in shapes)
    }
    return HfModel(config, TensorSource(headers, read), layout.title)


def _recognize(folder: Path, content: Json, tensors: Mapping[str, Tensor]) -> Layout:
    kind = content.get("model_type")
    candidates = [layout for layout in READ if layout.model_type == kind]
    if not candidates:
        known = ", ".join(sorted({layout.model_type for layout in READ}))
        raise CheckpointError(
            f"{folder} is a Hugging Face model of type {shortened(repr(kind))}, which is not supported; the types of "
            f"RWKV are {known}"
        )
    for layout in candidates:
        if layout.mark in tensors:
            return layout
    marks = " or ".join(f"'{layout.mark}'" for layout in candidates)
    raise CheckpointError(
        f"{folder}: tensor {marks} is missing, which every Hugging Face model of type {kind!r} has"
    )


def _residual_factor(path: Path, layout: Layout, content: Json) -> float:
    if "norm_eps" not in layout.keys.free:
        return 1.0  # its class has no such key, and ignores it
    try:
        return residual_factor(content)
    except (ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path} describes no model: {error}") from error


def _shapes(path: Path, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The official name and shape of each tensor that a folder holds."""
    unused = unused_parameters(config.arch)
    expected = expected_shapes(config, source=str(path))
    return {name: shape for name, shape in expected.items() if name not in unused}


def _their_headers(rows: list[Row], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What the folder must hold: their name -> a tensor of the shape."""
    ours = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {row.theirs: row.change.write([ours[name] for name in row.ours]) for row in rows}


def _check_headers(
    folder: Path,
    layout: Layout,
    config: ModelConfig,
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
) -> None:
    model = f"{layout.title} with n_layer {config.n_layer} and n_embd {config.n_embd}"
    for name, header in wanted.items():
        if name not in found:
            raise CheckpointError(
                f"{folder}: tensor '{name}' is missing; {model} has it, with shape {list(header.shape)}"
            )
        if found[name].shape != header.shape:
            raise CheckpointError(
                f"{folder}: tensor '{name}' has shape {list(found[name].shape)}; {model} has {list(header.shape)}"
            )
    for name, header in found.items():
        if name not in wanted:
            raise CheckpointError(
                f"{folder}: tensor '{name}' {list(header.shape)} is extra; {model} has no such tensor"
            )
