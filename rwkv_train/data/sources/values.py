"""What a field of a record says: the text of a document, and the domain it comes from."""

import json
from collections.abc import Sequence

from rwkv_train.data.sources.base import UNKNOWN_DOMAIN
from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import encode_utf8

_SHOWN_NAMES = 30
_SHOWN_CHARACTERS = 60


def text_of(value: object, name: str) -> str:
    """Return the text that a field holds.

    Args:
        value: the field; bytes are text that was not decoded yet.
        name: what the field is called.

    Raises:
        DataError: it is no string, not UTF-8 or not Unicode.
    """
    if isinstance(value, bytes):
        return decode(value)
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise DataError(f'"{name}" must be a string, found {found}')
    encode_utf8(value)
    return value


def domain_of_meta(meta: object) -> str:
    """Return ``pile_set_name`` of a ``meta``, an object or (in some copies of the Pile) a string that holds one.

    Raises:
        DataError: it is not UTF-8 or not Unicode.
    """
    meta = decode(meta) if isinstance(meta, bytes) else meta
    if isinstance(meta, str):
        meta = _parse(meta)
    return _name(meta.get("pile_set_name")) if isinstance(meta, dict) else UNKNOWN_DOMAIN


def domain_of_field(value: object) -> str:
    """Return the domain that a field chosen by the user names: a string, a number or a ``meta``.

    Raises:
        DataError: it is not UTF-8 or not Unicode.
    """
    value = decode(value) if isinstance(value, bytes) else value
    if isinstance(value, dict) or (isinstance(value, str) and value.startswith("{")):
        return domain_of_meta(value)
    return str(value) if isinstance(value, int) else _name(value)


def decode(data: bytes) -> str:
    """Return UTF-8 as text; a DataError names the first byte that is none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte 0x{data[error.start]:02x})") from error


def show_names(names: Sequence[str]) -> str:
    """Return names that a file holds for a message: on one line and not too many."""
    shown = ", ".join(repr(name[:_SHOWN_CHARACTERS]) for name in names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")


def _name(value: object) -> str:
    value = decode(value) if isinstance(value, bytes) else value
    if not isinstance(value, str) or not value:
        return UNKNOWN_DOMAIN
    encode_utf8(value)
    return value


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None  # a remark, not the Pile's object
