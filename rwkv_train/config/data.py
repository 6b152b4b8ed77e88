"""Where the tokens come from and in which order they are read."""

from typing import Literal

from pydantic import Field

from rwkv_train.config.base import Config


class DatasetConfig(Config):
    """A dataset that Hugging Face's ``datasets`` reads: one of the hub, a folder, or files."""

    path: str = Field(min_length=1)
    """Name on the hub, a local folder (also of save_to_disk), or a kind of files: json, parquet, csv, text."""
    name: str | None = None
    """Name of its configuration, for a dataset that has several."""
    split: str = Field(default="train", min_length=1)
    """Which of its splits is read."""
    data_files: list[str] | None = None
    """Only these files of it; with a kind of files as path, the files themselves."""
    revision: str | None = None
    """Branch, tag or commit of the dataset on the hub; a commit never changes."""
    text_column: str = "text"
    """Name of the column that holds the text."""
    domain_column: str | None = None
    """Name of the column that names a text's domain; null: the domain is "unknown"."""


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
