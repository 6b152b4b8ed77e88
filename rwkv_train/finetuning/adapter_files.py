"""A trained adapter written in the format of the peft library, so that peft and we can read it."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.adapter_note import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterNote, write_note
from rwkv_train.checkpoints.adapters import PEFT_PREFIX
from rwkv_train.checkpoints.descriptions import Json, write_json
from rwkv_train.checkpoints.safetensors_file import SafetensorsWriter, table_size
from rwkv_train.config.methods import LoraMethod
from rwkv_train.finetuning.adapters import ADAPTER_NAME, INITIAL_A, INITIAL_B
from rwkv_train.finetuning.targets import last_fit


def write_adapter(
    folder: Path, own_tensors: Mapping[str, Tensor], method: LoraMethod, note: AdapterNote
) -> None:
    """Write an adapter: ``adapter_config.json``, ``adapter_model.safetensors`` and our note ``rwkv_train.json``.

    PiSSA is written as the LoRA of twice the rank that gives the same on the base as it was: the trained matrices
    beside the negative of the initial ones.

    Args:
        folder: an empty or unfinished folder, which the caller names when it is whole.
        own_tensors: the adapter's own parameters by their names in the model, whole, on any device.
        method: what it was trained with.
        note: what else is known.

    Raises:
        OSError: the disk refuses.
    """
    tensors = _as_lora_of_the_base(own_tensors) if method.variant == "pissa" else own_tensors
    stored = {_peft_name(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    ranks = {
        name.removeprefix(PEFT_PREFIX).partition(end)[0]: tensor.shape[0]
        for name, tensor in stored.items()
        for end in (".lora_A.", ".miss_block")
        if end in name
    }
    write_json(folder / ADAPTER_CONFIG, _peft_config(method, ranks))
    table_bytes = table_size((name, tensor.shape) for name, tensor in stored.items())
    with SafetensorsWriter(folder / ADAPTER_WEIGHTS, table_bytes) as file:
        for name, tensor in sorted(stored.items()):
            file.add(name, tensor)
    write_note(folder, note)


def _peft_name(name: str) -> str:
    """Return what peft calls a parameter in a file: without the adapter's name."""
    bare = name.replace(f".{ADAPTER_NAME}", "")
    # The lengths of DoRA are a vector to it, though a module holds them.
    return PEFT_PREFIX + bare.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def _as_lora_of_the_base(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join what was learned and what was taken out of the base: ``B A - B0 A0 = [B, -B0] [A; A0]``."""
    found = {}
    for name, tensor in own.items():
        layer, is_a, _ = name.partition(".lora_A.")
        if is_a:
            found[name] = torch.cat([tensor, own[f"{layer}.{INITIAL_A}"]])
        layer, is_b, _ = name.partition(".lora_B.")
        if is_b:
            found[name] = torch.cat([tensor, -own[f"{layer}.{INITIAL_B}"]], dim=1)
    return found


def _peft_config(method: LoraMethod, ranks: Mapping[str, int]) -> Json:
    common: Json = {
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
    }
    common |= {"target_modules": sorted(ranks), "modules_to_save": None}
    if method.variant == "miss":
        return {
            "peft_type": "MISS",
            **common,
            "r": method.rank,
            "miss_dropout": method.dropout,
            "init_weights": True,
        }
    # Twice the rank, the same scale: alpha / r or alpha / sqrt(r).
    is_double = method.variant == "pissa"
    rank = 2 * method.rank if is_double else method.rank
    factor = 1.0 if not is_double else math.sqrt(2) if method.rslora else 2.0
    alphas = {layer: last_fit(layer, method.alpha_pattern, method.alpha) for layer in ranks}
    return {
        "peft_type": "LORA",
        **common,
        "r": rank,
        "lora_alpha": _plain(factor * method.alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "use_dora": method.variant == "dora",
        "rank_pattern": {layer: found for layer, found in ranks.items() if found != rank},
        "alpha_pattern": {
            layer: _plain(factor * alpha) for layer, alpha in alphas.items() if alpha != method.alpha
        },
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }


def _plain(alpha: float) -> float:
    """Return a whole number as an int, as peft writes it."""
    return int(alpha) if alpha == int(alpha) else alpha
