"""Tokens to text while they are being generated."""

import codecs

from rwkv_train.tokenizers.base import Tokenizer


class StreamingDecoder:
    """Turns tokens into pieces of text that are whole characters.

    A token may be a part of a character: its bytes are held back until the character is complete. Bytes
    that can never become one read as U+FFFD. Memory is constant.

    Args:
        tokenizer: the tokenizer of the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def pending(self) -> bytes:
        """The beginning of a character that is held back."""
        return self._utf8.getstate()[0]

    def feed(self, token: int) -> str:
        """Return the text that is complete with this token, perhaps none.

        The end of a document completes what is held back. An id beyond the tokenizer's, which a model with
        a larger vocabulary can produce, reads as U+FFFD.
        """
        if token == self._tokenizer.end_of_document:
            return self.flush()
        if token >= self._tokenizer.vocab_size:
            return self.flush() + "\N{REPLACEMENT CHARACTER}"
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """Return U+FFFD for a character that will not be completed, else nothing; then start afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
