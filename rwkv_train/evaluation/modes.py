"""What a model knows of a document when it predicts a token of it. Loads no torch: the command line names these too."""

from enum import StrEnum

from rwkv_train.errors import ConfigError


class Mode(StrEnum):
    """What is known when a token is predicted."""

    STATEFUL = "stateful"
    """All of the document before it."""
    WINDOWED = "windowed"
    """What stands before it in its window, as in lm-evaluation-harness."""
    STREAM = "stream"
    """All of the data before it."""


def require_mode(mode: Mode, window: int | None, *, has_prefix: bool) -> None:
    """Refuse settings that do not go together.

    Raises:
        ConfigError: with their names.
    """
    if mode is Mode.WINDOWED and window is None:
        raise ConfigError("--mode windowed needs --window N, the tokens that are read in one window")
    if mode is not Mode.WINDOWED and window is not None:
        raise ConfigError(
            f"--window {window} has a meaning with --mode windowed only; the mode is {mode.value}"
        )
    if window is not None and window < 1:
        raise ConfigError(f"--window is {window}; it must be at least 1")
    if mode is Mode.STREAM and not has_prefix:
        raise ConfigError("--mode stream needs a token between documents; --prefix-token none gives it none")
