"""Find a tokenizer by the name a user gives."""

from pathlib import Path

from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import Tokenizer

_NEOX_REPOSITORY = "EleutherAI/gpt-neox-20b"


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer ``name``.

    Args:
        name: ``"bytes"``; ``"world"``; ``"neox"`` (GPT-NeoX-20B, from the Hugging Face cache or hub); or the
            path of a Hugging Face ``tokenizer.json``.

    Raises:
        DataError: there is none of this name, or its file cannot be had or read.
    """
    # Each is imported when it is asked for: none should pay for the others' start.
    if name == "bytes":
        from rwkv_train.tokenizers.bytes import ByteTokenizer  # noqa: PLC0415

        return ByteTokenizer()
    if name == "world":
        from rwkv_train.tokenizers.world import WorldTokenizer  # noqa: PLC0415

        return WorldTokenizer()
    from rwkv_train.tokenizers.huggingface import HuggingFaceTokenizer  # noqa: PLC0415

    if name == "neox":
        return HuggingFaceTokenizer(_find_neox_file(), name)
    try:
        path = Path(name).expanduser()
        there = path.is_file()
    except (OSError, RuntimeError):  # a name that is too long, the home of nobody
        there = False
    if not there:
        raise DataError(
            f"there is no tokenizer '{name}': wanted 'bytes', 'world', 'neox' or the path of a tokenizer.json"
        )
    return HuggingFaceTokenizer(path, name)


def find_cached_neox_file() -> Path | None:
    """Return the GPT-NeoX-20B tokenizer of the Hugging Face cache, or ``None``; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    cached = try_to_load_from_cache(_NEOX_REPOSITORY, "tokenizer.json")
    return Path(cached) if isinstance(cached, str) else None


def _find_neox_file() -> Path:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415

    try:
        return Path(hf_hub_download(_NEOX_REPOSITORY, "tokenizer.json"))
    except (OSError, ValueError, EntryNotFoundError) as error:  # its network errors are OSErrors
        reason = str(error).strip().split("\n", 1)[0]
        raise DataError(
            f"the tokenizer 'neox' could not be had from {_NEOX_REPOSITORY} on huggingface.co ({reason}); "
            "pass the path of its file (20B_tokenizer.json or tokenizer.json) instead of 'neox'"
        ) from error
