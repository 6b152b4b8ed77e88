"""What every tokenizer offers, and the two rules that all of them share."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rwkv_train.errors import DataError

TokenArray = npt.NDArray[np.integer]
"""Token ids as they are stored on disk; :func:`token_dtype` says of which type."""


class TokenizerIdentity(NamedTuple):
    """What a corpus or a checkpoint carries to be recognised by."""

    name: str
    """What ``load_tokenizer`` takes: "bytes", "world", "neox" or a path."""
    sha256: str
    """Hash of the vocabulary's definition, in hexadecimal."""

    def matches(self, other: "TokenizerIdentity") -> bool:
        """Say whether both give the same ids. The name does not count: a file may lie elsewhere."""
        return self.sha256 == other.sha256


class Tokenizer(Protocol):
    """A fixed table of byte strings and the rule that cuts text into them."""

    @property
    def identity(self) -> TokenizerIdentity:
        """Name and hash."""

    @property
    def vocab_size(self) -> int:
        """Every id is below this. A model's vocabulary may be larger, never smaller."""

    @property
    def end_of_document(self) -> int:
        """The id that ends a document; no text contains it."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without the end of the document; a DataError if it is not Unicode."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""

    def encode_arrays(self, texts: Sequence[str]) -> list[TokenArray]:
        """Return the same ids as :meth:`encode_batch` as arrays of ``token_dtype(vocab_size)``, faster."""

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes that the ids stand for, which may end within a character.

        The end of a document stands for nothing. An id that the tokenizer does not have is a DataError.
        """


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the smallest type of the token files in which every id below ``vocab_size`` fits."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def encode_utf8(text: str) -> bytes:
    """Return a text as UTF-8.

    Raises:
        DataError: it holds half of a surrogate pair, which is no character and has no UTF-8 form.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(
            f"character {error.start} of the text is U+{code:04X}, half of a surrogate pair: it is not valid "
            "Unicode; remove it or replace it by U+FFFD"
        ) from error


def unknown_token(token: int, tokenizer: Tokenizer) -> DataError:
    """Make the error for an id that a tokenizer does not have."""
    return DataError(
        f"token id {token} does not exist in the tokenizer '{tokenizer.identity.name}', whose ids are below "
        f"{tokenizer.vocab_size}"
    )
