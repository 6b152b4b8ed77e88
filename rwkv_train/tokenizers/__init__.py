"""Text to token ids and back: raw bytes, RWKV's World vocabulary, any Hugging Face ``tokenizer.json``."""

from rwkv_train.tokenizers.base import Tokenizer, TokenizerIdentity
from rwkv_train.tokenizers.loading import load_tokenizer
from rwkv_train.tokenizers.streaming import StreamingDecoder

__all__ = ["StreamingDecoder", "Tokenizer", "TokenizerIdentity", "load_tokenizer"]
