"""The JSON beside weights - ``config.json`` and ``manifest.json`` - checked before anything in it is used."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rwkv_train.checkpoints.formats import FORMAT_VERSION
from rwkv_train.checkpoints.io import sha256_of
from rwkv_train.config.load import check_model
from rwkv_train.config.model import ModelConfig
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.tokenizers import TokenizerIdentity

Json = dict[str, Any]
"""A JSON object."""

Kinds = Mapping[str, tuple[type, ...]]
"""Key -> types that its value may have."""


def read_json(path: Path) -> Json:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: it is missing, or not that.
    """
    return parse_json(path, read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Read a file as it is.

    Raises:
        CheckpointError: the operating system refuses.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_json(path: Path, raw: bytes) -> Json:
    """Turn what was read from ``path`` into one JSON object.

    Raises:
        CheckpointError: it is not that.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def write_json(path: Path, content: Json) -> None:
    """Write one JSON object, for people to read too; NaN and infinity are refused (``ValueError``)."""
    path.write_text(json_text(content), encoding="utf-8", newline="\n")


def json_text(content: Json) -> str:
    """Return one JSON object as text, for people to read too; NaN and infinity are refused (``ValueError``)."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def find_problem(content: Json, kinds: Kinds) -> str | None:
    """Say what is wrong with the keys of a description and the types of their values, or ``None``."""
    if (found := content.get("format")) != FORMAT_VERSION:
        return f"its format is {found!r}, but this version reads '{FORMAT_VERSION}'"
    for key, wanted in kinds.items():
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in wanted)
        if key not in content:
            return f"it has no '{key}' ({names})"
        # In Python a bool is an int; in a description it is not.
        if not isinstance(content[key], wanted) or isinstance(content[key], bool):
            return f"'{key}' is {_show(content[key])}, not of type {names}"
        if isinstance(content[key], int) and content[key] < 0:
            return f"'{key}' is {content[key]}, which must not be negative"
    return None


def parse_model(path: Path, section: Json) -> ModelConfig:
    """Turn the architecture settings of a description into settings.

    Raises:
        CheckpointError: a name or value does not fit.
    """
    try:
        return check_model(section)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def parse_tokenizer(path: Path, section: Json | None) -> TokenizerIdentity | None:
    """Turn ``{"name", "sha256"}`` into an identity; ``None`` stays ``None``: the tokenizer is not known.

    Raises:
        CheckpointError: a part is missing or not text.
    """
    if section is None:
        return None
    name, sha256 = section.get("name"), section.get("sha256")
    if not isinstance(name, str) or not isinstance(sha256, str):
        raise CheckpointError(
            f"{path}: 'tokenizer' is {_show(section)}, but must hold the texts 'name' and 'sha256'"
        )
    return TokenizerIdentity(name, sha256)


def verify_files(path: Path, files: Json, names: Iterable[str]) -> None:
    """Compare files beside a description with the SHA-256 that it gives.

    Args:
        path: the description.
        files: its ``files`` section, name -> SHA-256.
        names: the files to check.

    Raises:
        CheckpointError: a file is missing, not named in the section, or differs.
    """
    for name in names:
        file = path.with_name(name)
        if name not in files:
            raise CheckpointError(f"{path}: 'files' does not name {name}")
        try:
            found = sha256_of(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
        if found != files[name]:
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 is {found}, but {path.name} says {_show(files[name])}"
            )


def shortened(text: str, limit: int = 80) -> str:
    """Return a text for a message: of one with more than ``limit`` characters, the beginning."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _show(value: object) -> str:
    return "null" if value is None else shortened(repr(value))
