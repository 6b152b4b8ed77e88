"""DeepSpeed's own checkpoints, as a foreign format: the weights, put together from every process's files.

The float32 master weights are what is taken: under bf16 the module's weights are those, rounded. DeepSpeed is
not needed to read them, and nothing of it is imported.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from rwkv_train.checkpoints.deepspeed_files import DeepSpeedFiles, StateFile, open_deepspeed_folder
from rwkv_train.checkpoints.pth import named_tensors
from rwkv_train.checkpoints.stand_ins import StandIn
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import require_dense
from rwkv_train.checkpoints.zero_partitions import (
    MisfitError,
    Shapes,
    Slice,
    cut_row,
    join_parts,
    join_slices,
)
from rwkv_train.errors import CheckpointError

logger = logging.getLogger(__name__)

_ZERO12_MASTERS = "single_partition_of_fp32_groups"
_ZERO3_MASTERS = "fp32_flat_groups"
_PLACES = "param_slice_mappings"


def read_deepspeed_folder(folder: Path) -> tuple[TensorSource, int | None]:
    """Read the weights of a checkpoint that DeepSpeed or Lightning's DeepSpeedStrategy wrote.

    Under ZeRO 1, 2 and 3 they are the float32 master weights; parameters that were not trained, and buffers,
    come from the module, in float32 too. Where there are no master weights under names (no ZeRO, or the
    optimizer's files are gone) the module's weights are taken as they are, with a warning if they are rounded.

    Args:
        folder: the folder of a tag, or the one above it that has ``latest``.

    Returns:
        Name in the module -> tensor, put together when it is asked for; and the number of optimizer steps where it
        is told.

    Raises:
        CheckpointError: a file is missing, damaged, malicious, or from another world size or step.
    """
    files = open_deepspeed_folder(folder)
    first = files.models[0]
    module = named_tensors(first.path, first.content["module"])
    require_dense(first.path, module)
    step = first.content.get("global_steps")
    tensors = _with_masters(files, module) if files.optimizers else _module_alone(files, module)
    return tensors, step if type(step) is int and step >= 0 else None


def _with_masters(files: DeepSpeedFiles, module: dict[str, Tensor]) -> TensorSource:
    first, optimizers = files.models[0], files.optimizers
    groups = [_shapes(first.path, group) for group in first.sequence("param_shapes")]
    try:
        if _ZERO3_MASTERS in optimizers[0].content:
            by_rank = [_partitions(optimizer, _ZERO3_MASTERS, len(groups)) for optimizer in optimizers]
            masters = [
                join_parts(shapes, partitions) for shapes, *partitions in zip(groups, *by_rank, strict=True)
            ]
            masters += _zero3_frozen(files)
        else:
            masters = _zero12_masters(optimizers, groups)
    except MisfitError as problem:
        raise CheckpointError(f"{files.tag} cannot be put together: {problem}") from None
    return _complete(first, module, masters)


def _zero12_masters(optimizers: list[StateFile], groups: Sequence[Shapes]) -> list[TensorSource]:
    by_rank = [_partitions(optimizer, _ZERO12_MASTERS, len(groups)) for optimizer in optimizers]
    # Not written before 2023. Places know of padding between parameters; the order alone does not.
    if not all(_PLACES in optimizer.content for optimizer in optimizers):
        return [cut_row(shapes, partitions) for shapes, *partitions in zip(groups, *by_rank, strict=True)]
    places = [_places(optimizer, len(groups)) for optimizer in optimizers]
    return [
        join_slices(shapes, [partitions[index] for partitions in by_rank], [place[index] for place in places])
        for index, shapes in enumerate(groups)
    ]


def _zero3_frozen(files: DeepSpeedFiles) -> list[TensorSource]:
    """Parameters that no optimizer has; each process holds its part of them in its model states."""
    first = files.models[0]
    frozen = []
    for name, shape in _shapes(first.path, first.mapping("frozen_param_shapes")).items():
        parts = []
        for model in files.models:
            part = model.mapping("frozen_param_fragments").get(name)
            if not _is_dense(part):
                raise CheckpointError(f"{model.path} lacks its part of parameter '{name}'")
            parts.append(part.detach().flatten())
        frozen.append(join_parts({name: shape}, parts))
    return frozen


def _complete(first: StateFile, module: dict[str, Tensor], masters: Sequence[TensorSource]) -> TensorSource:
    """All weights in the module's order and float32.

    They are what was put together, second names of the same, and what only the module has: buffers, and
    under ZeRO 1 and 2 the parameters that are not trained.
    """
    source_of = {name: source for source in masters for name in source}
    shared, buffers = first.mapping("shared_params"), first.sequence("buffer_names")
    places = {_place(tensor): name for name, tensor in module.items() if name in source_of and tensor.numel()}
    complete: dict[str, tuple[TensorSource, str]] = {}
    for name, tensor in module.items():
        original = name if name in source_of else str(shared.get(name, places.get(_place(tensor))))
        if original in source_of:
            complete[name] = source_of[original], original
        # Under ZeRO 3 the module has an empty tensor for each parameter; only its buffers are whole.
        elif tensor.numel() or name in buffers:
            complete[name] = TensorSource.of(module), name
    complete |= {name: (source, name) for name, source in source_of.items() if name not in complete}

    def widened(name: str) -> Tensor:
        source, original = complete[name]
        tensor = source[original]
        return tensor.float() if tensor.is_floating_point() else tensor

    headers = {name: source.headers[original] for name, (source, original) in complete.items()}
    return TensorSource(
        {name: h.float() if h.is_floating_point() else h for name, h in headers.items()}, widened
    )


def _module_alone(files: DeepSpeedFiles, module: dict[str, Tensor]) -> TensorSource:
    """The module's own weights, where no file has the master weights."""
    first = files.models[0]
    groups = [*first.sequence("param_shapes"), first.mapping("frozen_param_shapes")]
    for name, shape in ((n, s) for group in groups for n, s in _shapes(first.path, group).items()):
        if name in module and tuple(module[name].shape) != tuple(shape):
            raise CheckpointError(
                f"{files.tag} lacks the files *_optim_states.pt, in which ZeRO 3 keeps weights such as '{name}'; "
                "copy them too"
            )
    rounded = {tensor.dtype for tensor in module.values()} & {torch.bfloat16, torch.float16}
    if rounded:
        logger.warning(
            "%s has no float32 master weights under names; the module's weights are taken, in %s",
            files.tag,
            ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in rounded)),
        )
    return TensorSource.of(module)


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Equal for two names of one tensor, which torch.save keeps one."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _groups(optimizer: StateFile, key: str, n_groups: int) -> list[object]:
    groups = optimizer.sequence(key)
    if len(groups) != n_groups:
        raise CheckpointError(
            f"{optimizer.path}: {key} has {len(groups)} groups, the model states {n_groups}"
        )
    return groups


def _partitions(optimizer: StateFile, key: str, n_groups: int) -> list[Tensor]:
    """A process's part of each group, each ``[n]``."""
    partitions = _groups(optimizer, key, n_groups)
    rows = [part.detach() for part in partitions if _is_dense(part) and part.dim() == 1]
    if len(rows) != n_groups:
        raise CheckpointError(f"{optimizer.path}: {key} holds something else than rows of numbers")
    require_dense(optimizer.path, {f"{key}[{index}]": row for index, row in enumerate(rows)})
    return rows


def _is_dense(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()


def _places(optimizer: StateFile, n_groups: int) -> list[dict[str, Slice]]:
    """Where the pieces of parameters lie in a process's part of each group."""
    places = []
    for group in _groups(optimizer, _PLACES, n_groups):
        if not isinstance(group, dict):
            raise CheckpointError(f"{optimizer.path}: {_PLACES} holds something else than dictionaries")
        places.append({str(name): _slice(optimizer.path, name, place) for name, place in group.items()})
    return places


def _slice(path: Path, name: object, place: object) -> Slice:
    fields = place.state if isinstance(place, StandIn) else None
    if isinstance(fields, dict):
        start, numel = fields.get("start"), fields.get("numel")
        if isinstance(start, int) and isinstance(numel, int):
            return Slice(start, numel)
    raise CheckpointError(f"{path}: the place of parameter {name!r} in it cannot be read")


def _shapes(path: Path, group: object) -> Mapping[str, tuple[int, ...]]:
    """Parameter -> shape, of one group."""
    if isinstance(group, dict) and all(_is_shape(shape) for shape in group.values()):
        return {str(name): tuple(shape) for name, shape in group.items()}
    raise CheckpointError(f"{path}: param_shapes holds something else than names and shapes")


def _is_shape(value: object) -> bool:
    return isinstance(value, Iterable) and all(isinstance(side, int) and side >= 0 for side in value)
