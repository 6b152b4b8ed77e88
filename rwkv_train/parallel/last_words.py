"""What a process says that ends without its interpreter's help."""

import os


def say(sentence: str) -> None:
    """Write an error to stderr, from a process that is about to end without its interpreter's help."""
    os.write(2, f"error: {sentence}\n".encode())
