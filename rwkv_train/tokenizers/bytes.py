"""The built-in tokenizer: one token for each byte of the UTF-8 text, so it fits every language and file."""

import hashlib
from collections.abc import Sequence

import numpy as np

from rwkv_train.tokenizers.base import TokenArray, TokenizerIdentity, encode_utf8, unknown_token

_SHIFTED = [byte + 1 for byte in range(256)]


class ByteTokenizer:
    """Byte b is token b + 1; token 0 ends a document."""

    vocab_size = 257
    end_of_document = 0

    def __init__(self) -> None:
        definition = "".join(f"{token} {token - 1:02x}\n" for token in range(1, 257))
        self.identity = TokenizerIdentity("bytes", hashlib.sha256(definition.encode()).hexdigest())

    def encode(self, text: str) -> list[int]:
        """Return one id for each byte of the UTF-8 text."""
        return [_SHIFTED[byte] for byte in encode_utf8(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[TokenArray]:
        """Return the ids of each text as uint16."""
        return [np.frombuffer(encode_utf8(text), np.uint8).astype(np.uint16) + np.uint16(1) for text in texts]

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes; token 0 stands for none."""
        try:
            return bytes(token - 1 for token in tokens if token != 0)
        except ValueError:
            wrong = next(token for token in tokens if not 0 <= token <= 256)
            raise unknown_token(wrong, self) from None
