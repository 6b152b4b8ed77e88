"""Where the tokens come from and in which order they are read."""

from typing import Literal

from rwkv_train.config.base import Config


class DataConfig(Config):
    """A tokenized corpus for training and one for validation."""

    train: str = "builtin"
    """Prefix of a .bin/.idx pair made by prepare-data, or "builtin"."""
    valid: str | None = "builtin"
    """The same for validation; null: no validation."""
    tokenizer: str = "bytes"
    """The corpus' tokenizer: "bytes", "world", "neox", or the path of a Hugging Face tokenizer.json."""
    order: Literal["shuffled", "sequential", "official"] = "shuffled"
    """Order of the samples: a seeded permutation in each epoch, as they lie on disk, or RWKV-LM's cubic-prime one."""
    cache_dir: str = "~/.cache/rwkv-train"
    """Folder in which the built-in corpus is written once."""
