"""What we write beside an adapter in peft's format: which base it is of, and what else a user of it must know."""

from pathlib import Path
from typing import NamedTuple

from rwkv_train.checkpoints.descriptions import (
    Json,
    Kinds,
    find_problem,
    parse_model,
    parse_tokenizer,
    read_json,
    verify_files,
    write_json,
)
from rwkv_train.checkpoints.formats import FORMAT_VERSION
from rwkv_train.checkpoints.infer import make_explicit
from rwkv_train.checkpoints.io import sha256_of
from rwkv_train.config.model import ModelConfig
from rwkv_train.config.save import to_tree
from rwkv_train.errors import CheckpointError
from rwkv_train.tokenizers import TokenizerIdentity

ADAPTER_CONFIG = "adapter_config.json"
"""Name that peft gives the settings of an adapter."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""Name that peft gives its tensors."""

ADAPTER_NOTE = "rwkv_train.json"
"""Name of our note beside them."""

_KEYS: Kinds = {
    "base": (str,),
    "model": (dict,),
    "tokenizer": (dict, type(None)),
    "template": (str, type(None)),
    "step": (int,),
    "files": (dict,),
}


class AdapterNote(NamedTuple):
    """Facts about an adapter that peft's format has no place for."""

    base: str
    """Fingerprint of the weights that it was trained on."""
    model: ModelConfig
    """The sizes of that model."""
    tokenizer: TokenizerIdentity | None
    """What its texts were read with."""
    template: str | None
    """Name of the template of its conversations."""
    step: int
    """Optimizer steps that it was trained for."""


def write_note(folder: Path, note: AdapterNote) -> None:
    """Write the note, with the SHA-256 of the two files that lie there already."""
    content: Json = {
        "format": FORMAT_VERSION,
        "base": note.base,
        "model": to_tree(make_explicit(note.model)),
        "tokenizer": None if note.tokenizer is None else note.tokenizer._asdict(),
        "template": note.template,
        "step": note.step,
        "files": {name: sha256_of(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)},
    }
    write_json(folder / ADAPTER_NOTE, content)


def read_note(folder: Path) -> AdapterNote | None:
    """Read the note, and compare the files beside it with their SHA-256; ``None``: there is no note.

    Raises:
        CheckpointError: the note or a file is damaged.
    """
    path = folder / ADAPTER_NOTE
    if not path.exists():
        return None
    content = read_json(path)
    if problem := find_problem(content, _KEYS):
        raise CheckpointError(f"{path} cannot be used: {problem}")
    verify_files(path, content["files"], (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return AdapterNote(
        content["base"],
        make_explicit(parse_model(path, content["model"])),
        parse_tokenizer(path, content["tokenizer"]),
        content["template"],
        content["step"],
    )
