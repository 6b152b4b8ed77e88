"""What a preparation says while it works."""

from typing import Protocol


class Progress(Protocol):
    """Is told of the stages of a preparation."""

    def begin(self, stage: str, n_bytes: int | None) -> None:
        """A stage begins: "tokenizing", "choosing" or "writing".

        Args:
            stage: its name.
            n_bytes: bytes of the inputs it will go through; ``None``: not known.
        """

    def advance(self, n_bytes: int) -> None:
        """So many more bytes of the inputs, as stored, are done."""


class Silence:
    """Tells nobody."""

    def begin(self, stage: str, n_bytes: int | None) -> None:
        """Do nothing."""

    def advance(self, n_bytes: int) -> None:
        """Do nothing."""
