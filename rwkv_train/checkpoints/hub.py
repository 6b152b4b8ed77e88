"""Paths that a user may give: on this disk, or ``hf:OWNER/NAME/FILE`` on the Hugging Face Hub."""

from pathlib import Path

from rwkv_train.errors import CheckpointError

HUB_PREFIX = "hf:"


def resolve_path(path: str | Path) -> Path:
    """Return a local path; a file on the Hub is downloaded into huggingface_hub's cache, once.

    Args:
        path: a local path, or ``"hf:OWNER/NAME/FILE"``; ``FILE`` may lie in folders of the repository.

    Raises:
        CheckpointError: there is nothing at the path, or the file cannot be had from the Hub.
    """
    text = str(path)
    if text.startswith(HUB_PREFIX):
        return _download(text)
    try:
        local = Path(path).expanduser()
        there = local.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL character, the home of nobody
        raise CheckpointError(f"{text!r} is not a path: {error}") from error
    if not there:
        broken = " (a symbolic link to something that is not there)" if local.is_symlink() else ""
        raise CheckpointError(f"{local}: there is no such file or folder{broken}")
    return local


def _download(text: str) -> Path:
    owner, _, rest = text.removeprefix(HUB_PREFIX).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise CheckpointError(f"{text} names no file on the Hugging Face Hub; write it as hf:OWNER/NAME/FILE")
    # Here, because it takes a fifth of a second to import and most paths are local.
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415

    try:
        return Path(hf_hub_download(repo_id=f"{owner}/{name}", filename=file))
    except (OSError, ValueError, EntryNotFoundError) as error:  # its network errors are OSErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{text} cannot be had from the Hugging Face Hub: {_first_sentence(reason)}; check the name "
            "and the network, or download the file and give its path"
        ) from error


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")
