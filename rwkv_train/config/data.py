"""Where the tokens come from and in which order they are read."""

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, Tag, model_validator

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


class StreamingConfig(DatasetConfig):
    """A dataset that is tokenized while the run reads it, in its own order or a little shuffled."""

    shuffle_buffer: NonNegativeInt = 0
    """Samples held back, from which the next one is drawn at random; every checkpoint holds them. 0: no shuffling."""


class WeightedCorpus(Config):
    """One of several training corpora."""

    path: str = Field(min_length=1)
    """Prefix of a .bin/.idx pair made by prepare-data, or "builtin"."""
    weight: PositiveFloat
    """Its part of the samples, relative to the other weights."""


class DataConfig(Config):
    """What a run trains on, prepared or streamed, and a tokenized corpus for validation."""

    train: (
        Annotated[
            Annotated[str, Tag("corpus")]
            | Annotated[list[WeightedCorpus], Field(min_length=1), Tag("mixture")],
            Discriminator(lambda value: "mixture" if isinstance(value, list) else "corpus"),
        ]
        | None
    ) = "builtin"
    """Prefix of a .bin/.idx pair made by prepare-data, "builtin", or a list of path and weight; null: streaming."""
    streaming: StreamingConfig | None = None
    """In place of train: a Hugging Face dataset that is tokenized as it comes."""
    valid: str | None = "builtin"
    """Prefix of the corpus for validation, or "builtin"; null: no validation."""
    tokenizer: str = "bytes"
    """The corpora's tokenizer: "bytes", "world", "neox", or the path of a Hugging Face tokenizer.json."""
    order: Literal["shuffled", "sequential", "official"] = "shuffled"
    """Order of the samples: a seeded permutation in each epoch, as they lie on disk, or RWKV-LM's cubic-prime one."""
    documents: Literal["stream", "reset"] = "stream"
    """In a sample the state goes on from one document to the next ("stream"), or each begins with a fresh one."""
    cache_dir: str = "~/.cache/rwkv-train"
    """Folder in which the built-in corpus is written once."""

    @model_validator(mode="before")
    @classmethod
    def _a_stream_takes_the_place_of_the_default(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("streaming") is not None and "train" not in tree:
            return {**tree, "train": None}
        return tree

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.train is not None and self.streaming is not None:
            raise ValueError(
                "train and streaming are both set, and a run reads either a prepared corpus or a stream; set train to "
                "null to read the stream, or streaming to null"
            )
        if self.train is None and self.streaming is None:
            raise ValueError("set train (a prepared corpus) or streaming (a dataset); found neither")
        if self.streaming is not None and self.order != "shuffled":
            raise ValueError(
                f"order {self.order!r} needs a prepared corpus; a stream has its dataset's order, or set "
                "streaming.shuffle_buffer"
            )
        return self

    @model_validator(mode="after")
    def _each_corpus_once(self) -> Self:
        if isinstance(self.train, list):
            path, n_times = Counter(corpus.path for corpus in self.train).most_common(1)[0]
            if n_times > 1:
                raise ValueError(
                    f"train names {path!r} {n_times} times; name it once, with the sum of the weights"
                )
        return self

    @property
    def train_paths(self) -> list[str]:
        """The prepared corpora that a run trains on; none where it streams."""
        if isinstance(self.train, list):
            return [corpus.path for corpus in self.train]
        return [] if self.train is None else [self.train]
