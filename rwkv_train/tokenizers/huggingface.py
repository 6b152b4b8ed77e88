"""Any Hugging Face ``tokenizer.json``, among them the GPT-NeoX-20B one of the models trained on the Pile.

The text is encoded as it is: strings such as ``<|endoftext|>`` inside it are ordinary text, no token is added
at its ends, nothing is cut or padded. What the file's own normaliser changes (the 20B one composes accents,
NFC) is lost for decoding.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import (
    TokenArray,
    TokenizerIdentity,
    encode_utf8,
    token_dtype,
    unknown_token,
)

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]")
"""Names under which tokenizer files define the end of a document, the first that exists is taken."""


class HuggingFaceTokenizer:
    """A tokenizer read from a ``tokenizer.json``.

    Args:
        path: the file.
        name: the name in the identity.

    Raises:
        DataError: the file cannot be read, is no such file, or has no token for the end of a document.
    """

    def __init__(self, path: Path, name: str) -> None:
        content = _read(path)
        try:
            backend = Backend.from_buffer(content)
        except Exception as error:  # the library raises nothing more precise
            raise DataError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # the *names* of special tokens in a text are text
        self.path = path
        """The file."""
        self._backend = backend
        self._added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self._token_of_id = {token: text for text, token in backend.get_vocab().items()}
        self._is_byte_level = _has_byte_level_decoder(json.loads(content).get("decoder"))
        self._decoded: dict[int, bytes] = {}
        self.vocab_size = max(self._token_of_id, default=-1) + 1
        self.end_of_document = self._find_end_of_document(path)
        self.identity = TokenizerIdentity(name, hashlib.sha256(content).hexdigest())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        for text in texts:
            encode_utf8(text)  # the library's own message for a lone surrogate does not name it
        batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def encode_arrays(self, texts: Sequence[str]) -> list[TokenArray]:
        """Return the ids of each text as uint16, or int32 for a vocabulary over 65536."""
        dtype = token_dtype(self.vocab_size)
        return [np.fromiter(ids, dtype, count=len(ids)) for ids in self.encode_batch(texts)]

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes of each token in turn.

        Exact for byte-level tokenizers. For others a token's text is the one it has after another token.
        """
        return b"".join([self._decode_one(token) for token in tokens])

    def _decode_one(self, token: int) -> bytes:
        if token == self.end_of_document:
            return b""
        if token not in self._decoded:
            text = self._token_of_id.get(token)
            if text is None:
                raise unknown_token(token, self)
            self._decoded[token] = self._bytes_of(token, text)
        return self._decoded[token]

    def _bytes_of(self, token: int, text: str) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        if self._is_byte_level:
            return b"".join([self._byte_of_letter.get(letter, letter.encode()) for letter in text])
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):  # SentencePiece's byte fallback
            return bytes.fromhex(text[3:5])
        # Decoders drop spaces before the first token, so the second of two is the one that tells.
        once = self._backend.decode([token], skip_special_tokens=False)
        twice = self._backend.decode([token, token], skip_special_tokens=False)
        return twice[len(once) :].encode()

    def _find_end_of_document(self, path: Path) -> int:
        special = {added.content: token for token, added in self._added.items() if added.special}
        for name in END_NAMES:
            if name in special:
                return special[name]
        if 0 in special.values():  # RWKV's own convention
            return 0
        raise DataError(
            f"{path} has no token for the end of a document: a special token named one of "
            f"{', '.join(END_NAMES)}, or a special token 0"
        )

    @cached_property
    def _byte_of_letter(self) -> dict[str, bytes]:
        """GPT-2's table: 188 printable bytes stand for themselves, the others for U+0100 and following."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        letters = {chr(byte): bytes([byte]) for byte in printable}
        return letters | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def _has_byte_level_decoder(decoder: dict[str, object] | None) -> bool:
    if decoder is None:
        return False
    parts = decoder.get("decoders", [])
    assert isinstance(parts, list)
    return decoder.get("type") == "ByteLevel" or any(_has_byte_level_decoder(part) for part in parts)
