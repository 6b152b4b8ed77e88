"""Adapters in the format of the peft library, read without it: settings, tensors, and our note where there is one."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rwkv_train.checkpoints.adapter_layers import BlockSums, LayerAdapter, LowRank
from rwkv_train.checkpoints.adapter_note import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterNote, read_note
from rwkv_train.checkpoints.descriptions import Json, read_json, shortened
from rwkv_train.checkpoints.formats import CHECKPOINTS_FOLDER
from rwkv_train.checkpoints.hub import resolve_path
from rwkv_train.checkpoints.run_folder import newest_valid_checkpoint
from rwkv_train.checkpoints.tensor_files import TensorFiles
from rwkv_train.errors import CheckpointError

ValueT = TypeVar("ValueT", int, float)

PEFT_PREFIX = "base_model.model."
"""What peft puts before the name of every layer."""

_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector": "magnitude",
    "miss_block": "block",
}
"""End of a tensor's name -> what it is in a layer's adapter."""

_WANTED = {
    ("LORA", False): {"a", "b"},
    ("LORA", True): {"a", "b", "magnitude"},
    ("MISS", False): {"block"},
}
"""Kind of adapter, and whether it is DoRA -> what each layer has."""

_START_IS_IN_THE_BASE = {True, False, "gaussian", "eva", "orthogonal", "mica"}
"""Initial values of LoRA that leave the weights of the base as they are. Others (PiSSA, OLoRA, LoftQ, ...) change them,
and such an adapter fits the changed ones unless peft converted it."""

_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "init_weights",
    "bias",
}
"""Settings of peft that are heeded."""

_OF_TRAINING = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "mini_r",
    "miss_dropout",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
}
"""Settings of peft that say nothing about what a finished adapter computes. Any other one must be unset."""


class Adapter(NamedTuple):
    """A finished adapter, in memory."""

    path: Path
    """Its folder."""
    layers: Mapping[str, LayerAdapter]
    """Name of a linear layer (``"blocks.0.att.key"``) -> what is done to its weight."""
    note: AdapterNote | None
    """What our note says; ``None``: another program wrote it."""


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter.

    Args:
        path: a folder in peft's format, a training checkpoint of a run that trains an adapter, or the ``out_dir`` of
            such a run (its newest undamaged checkpoint).

    Raises:
        CheckpointError: there is none, it is damaged, or it is of a kind that we do not read.
    """
    folder = _find_folder(path)
    note = read_note(folder)
    config_path = folder / ADAPTER_CONFIG
    config = _Config(config_path, read_json(config_path))
    tensors = TensorFiles(folder, [ADAPTER_WEIGHTS])
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name in tensors:
        layer, part = _parse_name(folder / ADAPTER_WEIGHTS, name)
        if part not in config.wanted:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: tensor '{name}' does not belong to {config.kind}, which {ADAPTER_CONFIG} "
                "says the adapter is"
            )
        tensor = tensors[name].clone()
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: tensor '{name}' holds values that are not finite"
            )
        parts[layer][part] = tensor
    if not parts:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} holds no tensors")
    layers = {
        layer: _of_layer(folder / ADAPTER_WEIGHTS, config, layer, found) for layer, found in parts.items()
    }
    return Adapter(folder, layers, note)


def _find_folder(path: str | Path) -> Path:
    found = resolve_path(path)
    if not found.is_dir():
        raise CheckpointError(f"{found} is a file; an adapter is a folder that holds {ADAPTER_CONFIG}")
    if (found / ADAPTER_CONFIG).exists():
        return found
    if not (found / CHECKPOINTS_FOLDER).is_dir():
        raise CheckpointError(f"{found} is no adapter: it holds no {ADAPTER_CONFIG}")
    newest = newest_valid_checkpoint(found, with_optimizer=False)
    if newest is None:
        raise CheckpointError(f"{found} holds no training checkpoint yet")
    if not (newest / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{newest} holds no {ADAPTER_CONFIG}; the run trains no adapter")
    return newest


def _parse_name(path: Path, name: str) -> tuple[str, str]:
    """Return the layer that a tensor belongs to, and what it is there."""
    for ending, part in _PARTS.items():
        if name.startswith(f"{PEFT_PREFIX}blocks.") and name.endswith(f".{ending}"):
            return name.removeprefix(PEFT_PREFIX).removesuffix(f".{ending}"), part
    raise CheckpointError(
        f"{path}: tensor '{shortened(name)}' is unknown; wanted names as {PEFT_PREFIX}blocks.0.att.key.lora_A.weight"
    )


class _Config:
    """The settings of peft that are heeded, checked."""

    def __init__(self, path: Path, content: Json) -> None:
        self._path = path
        self._content = content
        kind, is_dora = content.get("peft_type"), content.get("use_dora") is True
        if kind not in {known for known, _ in _WANTED}:
            raise CheckpointError(f"{path}: peft_type is {kind!r}; adapters of LORA and MISS are read")
        self.is_miss = kind == "MISS"
        self.kind = "MiSS" if self.is_miss else "DoRA" if is_dora else "LoRA"
        self.wanted = _WANTED[kind, is_dora and not self.is_miss]
        self._refuse_the_unknown()
        self._rank = self._count("r", content.get("r"))
        self._alpha = 0.0 if self.is_miss else self._number("lora_alpha", content.get("lora_alpha"))
        self._ranks = {} if self.is_miss else self._section("rank_pattern", self._count)
        self._alphas = {} if self.is_miss else self._section("alpha_pattern", self._number)
        self._uses_root = content.get("use_rslora") is True

    def rank(self, layer: str) -> int:
        return _look_up(self._path, layer, self._ranks, self._rank)

    def scale(self, layer: str) -> float:
        rank = self.rank(layer)
        alpha = _look_up(self._path, layer, self._alphas, self._alpha)
        return alpha / (math.sqrt(rank) if self._uses_root else rank)

    def _refuse_the_unknown(self) -> None:
        content = self._content
        if content.get("bias", "none") != "none":
            raise CheckpointError(f"{self._path}: bias is {content['bias']!r}; our layers have none")
        start = content.get("init_weights" if self.is_miss else "init_lora_weights", True)
        if self.is_miss and not isinstance(start, bool):
            raise CheckpointError(
                f"{self._path}: init_weights is {start!r}; of MiSS only the usual form is read"
            )
        if not isinstance(start, bool | str) or start not in _START_IS_IN_THE_BASE:
            raise CheckpointError(
                f"{self._path}: init_lora_weights is {start!r}, which changes the base; let peft convert the adapter "
                "to plain LoRA when it saves it (path_initial_model_for_weight_conversion)"
            )
        for name, value in content.items():
            if name not in _READ | _OF_TRAINING and value not in (None, False, [], {}):
                raise CheckpointError(
                    f"{self._path}: {name} is {shortened(repr(value))}, which is not supported"
                )

    def _section(self, name: str, check: Callable[[str, Any], ValueT]) -> dict[str, ValueT]:
        section = self._content.get(name) or {}
        if not isinstance(section, dict):
            raise CheckpointError(f"{self._path}: {name} is {shortened(repr(section))}, not a JSON object")
        return {pattern: check(f"{name}.{pattern}", value) for pattern, value in section.items()}

    def _count(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self._path}: {name} is {shortened(repr(value))}; wanted a whole number above 0"
            )
        return value

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(
                f"{self._path}: {name} is {shortened(repr(value))}; wanted a positive number"
            )
        return value


def _look_up(path: Path, layer: str, patterns: Mapping[str, ValueT], default: ValueT) -> ValueT:
    """Return the value of the first pattern that fits, as peft does: a regular expression for the end of a name."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{path}: {shortened(repr(pattern))} is no regular expression: {error}"
            ) from error
    return default


def _of_layer(path: Path, config: _Config, layer: str, parts: Mapping[str, Tensor]) -> LayerAdapter:
    if missing := sorted(config.wanted - parts.keys()):
        name = next(ending for ending, part in _PARTS.items() if part == missing[0])
        raise CheckpointError(f"{path}: tensor '{PEFT_PREFIX}{layer}.{name}' is missing")
    rank = config.rank(layer)
    if config.is_miss:
        block = parts["block"]
        _require_shape(path, f"{layer}.miss_block", block, (rank, *block.shape[-1:]))
        return BlockSums(block)
    a, b = parts["a"], parts["b"]
    _require_shape(path, f"{layer}.lora_A.weight", a, (rank, *a.shape[-1:]))
    _require_shape(path, f"{layer}.lora_B.weight", b, (*b.shape[:1], rank))
    magnitude = parts.get("magnitude")
    if magnitude is not None:
        _require_shape(path, f"{layer}.lora_magnitude_vector", magnitude, tuple(b.shape[:1]))
    return LowRank(a, b, config.scale(layer), magnitude)


def _require_shape(path: Path, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tensor.shape != torch.Size(wanted) or tensor.numel() == 0:
        raise CheckpointError(
            f"{path}: tensor '{PEFT_PREFIX}{name}' has shape {list(tensor.shape)}, but {ADAPTER_CONFIG} implies "
            f"{list(wanted)}"
        )
