"""RWKV's World vocabulary: 65,529 byte strings, matched greedily from the left.

The package ``pyrwkv-tokenizer`` encodes; decoding goes through the vocabulary file inside that package,
because a token may be a part of a character and the package decodes whole characters only.
"""

import ast
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyrwkv_tokenizer

from rwkv_train.tokenizers.base import TokenArray, TokenizerIdentity, encode_utf8, unknown_token

_VOCABULARY_FILE = Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")


class WorldTokenizer:
    """Tokens 1 to 65529; token 0 ends a document.

    ``vocab_size`` is 65530, the ids that can occur; the published models have 65536 rows, of
    which the last six are unused.
    """

    vocab_size = 65_530
    end_of_document = 0

    def __init__(self) -> None:
        self.vocabulary = _read_vocabulary(_VOCABULARY_FILE)
        """The published file of it, lines of "ID LITERAL LENGTH" with Unix line ends."""
        self.identity = TokenizerIdentity("world", hashlib.sha256(self.vocabulary).hexdigest())

    def encode(self, text: str) -> list[int]:
        """Return the longest tokens that match, from the left."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        try:
            ids: list[list[int]] = self._backend.encode_batch(list(texts))
        except UnicodeEncodeError:
            for text in texts:
                encode_utf8(text)  # finds the text, and raises our error
            raise
        return ids

    def encode_arrays(self, texts: Sequence[str]) -> list[TokenArray]:
        """Return the ids of each text as uint16."""
        return [np.fromiter(ids, np.uint16, count=len(ids)) for ids in self.encode_batch(texts)]

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes, which may end within a character; token 0 stands for none."""
        pieces = self._pieces
        for token in tokens:
            if not 0 <= token < len(pieces):
                raise unknown_token(token, self)
        return b"".join([pieces[token] for token in tokens])

    @cached_property
    def _backend(self) -> pyrwkv_tokenizer.RWKVTokenizer:
        """What encodes; made when first needed, since it takes 240 MB and half a second."""
        return pyrwkv_tokenizer.RWKVTokenizer(vocab_filepath=str(_VOCABULARY_FILE))

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each token; made when first needed, since it takes half a second."""
        lines = self.vocabulary.decode().strip().split("\n")
        # A line is "ID LITERAL LENGTH", and the literal may hold spaces. One call for all literals is
        # several times faster than one for each.
        literals = ast.literal_eval(
            "[" + ",".join(line[line.index(" ") : line.rindex(" ")] for line in lines) + "]"
        )
        pieces = [b"", *(piece if isinstance(piece, bytes) else piece.encode() for piece in literals)]
        assert len(pieces) == self.vocab_size, f"the World vocabulary has {len(pieces)} tokens"
        return pieces


def _read_vocabulary(path: Path) -> bytes:
    """Return the vocabulary file as published with Unix line ends; a copy with others means the same."""
    return path.read_bytes().replace(b"\r\n", b"\n")
