"""Settings of a run on chat data: which conversations, how they are written, what of them is learned."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from rwkv_train.config.base import Config

Role = Literal["system", "user", "assistant", "tool"]
"""Who speaks in a message."""

RecordFormat = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference"]
"""What a record looks like."""

DEFAULT_FIELDS: dict[RecordFormat, dict[str, str]] = {
    "messages": {"messages": "messages", "role": "role", "content": "content", "learn": "learn"},
    "sharegpt": {
        "messages": "conversations",
        "role": "from",
        "content": "value",
        "learn": "learn",
        "system": "system",
    },
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output", "system": "system"},
    "prompt-completion": {"prompt": "prompt", "completion": "completion", "system": "system"},
    "text": {"text": "text"},
    "preference": {
        "prompt": "prompt",
        "chosen": "chosen",
        "rejected": "rejected",
        "role": "role",
        "content": "content",
        "system": "system",
    },
}
"""The parts of a record of each format, and the names that their fields have unless ``fields`` says otherwise."""

DEFAULT_ROLES: dict[str, Role] = {
    **{role: role for role in get_args(Role)},
    "human": "user",
    "gpt": "assistant",
}
"""What roles are called in data; ``roles`` adds to it."""

BUILTIN = "builtin"
"""In place of a path: a small set of tasks made by code."""


class InstructDataset(Config):
    """One dataset of conversations."""

    path: str = Field(min_length=1)
    """A .jsonl (also compressed), .json, .parquet, .csv or .txt file, a folder (but .json), hf:NAME, or "builtin"."""
    format: RecordFormat = "messages"
    """What its records look like."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Names of its fields where they are others than the format's: {part of the format: name in the data}."""
    roles: dict[str, Role] = Field(default_factory=dict)
    """What its roles mean where they are called otherwise: {name in the data: system, user, assistant or tool}."""
    weight: PositiveFloat = 1.0
    """Its part of the samples, relative to the other weights."""
    file_format: Literal["jsonl", "json", "parquet", "csv", "text"] | None = None
    """How the file is read, where its ending does not tell."""
    config: str | None = None
    """Configuration of an hf: dataset that has several."""
    split: str = Field(default="train", min_length=1)
    """Split of an hf: dataset, or of the built-in one (train, valid)."""
    streaming: bool = False
    """Read an hf: dataset as it comes over the network, instead of downloading it whole first."""

    @property
    def name(self) -> str:
        """What it is called among others: its path, with configuration and split where these are not the usual ones."""
        if self.config is None and self.split == "train":
            return self.path
        return ":".join(part for part in (self.path, self.config, self.split) if part is not None)

    @model_validator(mode="after")
    def _fields_are_those_of_the_format(self) -> Self:
        known = DEFAULT_FIELDS[self.format]
        if unknown := sorted(self.fields.keys() - known.keys()):
            raise ValueError(
                f"fields names {unknown[0]!r}, which the format {self.format!r} does not have; it has "
                f"{', '.join(known)}"
            )
        return self

    @model_validator(mode="after")
    def _roles_are_read_only_from_turns(self) -> Self:
        if self.roles and self.format not in ("messages", "sharegpt", "preference"):
            raise ValueError(f"roles changes nothing for the format {self.format!r}; leave it out")
        return self

    @model_validator(mode="after")
    def _options_have_something_to_change(self) -> Self:
        is_hub, is_builtin = self.path.startswith("hf:"), self.path == BUILTIN
        changed = self.model_dump(exclude_unset=True, exclude_defaults=True).keys()
        useless = changed & ({"config", "streaming"} if not is_hub else {"file_format"})
        useless |= changed & {"split"} if not is_hub and not is_builtin else set()
        if is_builtin:
            useless |= changed & {"file_format", "fields", "roles"}
            if self.format not in ("messages", "preference"):
                raise ValueError(
                    f"format must be 'messages' or 'preference' for the built-in dataset, found {self.format!r}"
                )
        if useless:
            raise ValueError(f"{min(useless)} changes nothing for the path {self.path!r}; leave it out")
        return self


class LearnConfig(Config):
    """Which messages are learned: the others are read, and no loss is taken on them."""

    roles: list[Role] = Field(default=["assistant"], min_length=1)
    """Messages of these roles."""
    turns: Literal["all", "first", "last"] = "all"
    """Of these messages all, or only the first or last one of a conversation."""


class InstructDataConfig(Config):
    """Conversations to learn from, or pairs of answers."""

    datasets: list[InstructDataset] = Field(min_length=1)
    """Where they come from; each dataset is shuffled by itself and takes its weight's part of the samples."""
    valid: list[InstructDataset] | None = Field(default=None, min_length=1)
    """Held-out conversations, whose loss is measured during the run; null: none of their own."""
    valid_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Instead: this part of each dataset is held out, chosen by trainer.seed; null: none is."""
    template: str = Field(default="g1", min_length=1)
    """How a conversation is written: "g1" (User: ..., Assistant: ..., as RWKV's chat models), or a Jinja file."""
    learn: Annotated[
        Annotated[Literal["assistant", "all"], Tag("rule")] | Annotated[LearnConfig, Tag("parts")],
        Discriminator(lambda value: "parts" if isinstance(value, dict | LearnConfig) else "rule"),
    ] = "assistant"
    """What the loss is taken on: assistant turns with their end, everything, or messages by role and turn."""
    tokenizer: str = "world"
    """The model's tokenizer: "bytes", "world", "neox", or the path of a Hugging Face tokenizer.json."""
    max_tokens: PositiveInt | None = None
    """Conversations of more tokens are left out; null: none is."""
    bad_records: Literal["refuse", "drop"] = "refuse"
    """At a record that cannot be used the run ends with its place, or it is left out and counted."""

    @model_validator(mode="after")
    def _each_dataset_once(self) -> Self:
        for name, datasets in (("datasets", self.datasets), ("valid", self.valid or [])):
            seen = set()
            for dataset in datasets:
                if dataset.name in seen:
                    raise ValueError(
                        f"{name} names {dataset.name!r} twice; name it once, with the sum of the weights"
                    )
                seen.add(dataset.name)
        return self

    @property
    def has_pairs(self) -> bool:
        """Whether these are pairs of answers, of which one is preferred, and not conversations."""
        return self.datasets[0].format == "preference"

    @model_validator(mode="after")
    def _pairs_stand_alone(self) -> Self:
        for dataset in [*self.datasets, *(self.valid or [])]:
            if (dataset.format == "preference") != self.has_pairs:
                raise ValueError(
                    f"{dataset.path!r} has the format {dataset.format!r} and {self.datasets[0].path!r} the format "
                    f"{self.datasets[0].format!r}; pairs of the format 'preference' cannot stand beside conversations"
                )
        if self.has_pairs and self.learn != "assistant":
            raise ValueError(
                "learn changes nothing for the format 'preference', of which the two answers are learned; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _texts_have_no_turns(self) -> Self:
        if self.learn != "assistant" and all(
            dataset.format == "text" for dataset in [*self.datasets, *(self.valid or [])]
        ):
            raise ValueError(
                "learn changes nothing for the format 'text', which is learned whole; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _held_out_is_not_learned(self) -> Self:
        learned = {dataset.name for dataset in self.datasets}
        for dataset in self.valid or []:
            if dataset.name in learned:
                raise ValueError(
                    f"valid names {dataset.path!r}, which datasets names too, so it would not be held out; name "
                    "another one, or set valid_fraction"
                )
            if dataset.weight != 1.0:
                raise ValueError(
                    f"the weight ({dataset.weight:g}) of {dataset.path!r} changes nothing in valid, where nothing is "
                    "mixed; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _held_out_in_one_way(self) -> Self:
        if self.valid is not None and self.valid_fraction is not None:
            raise ValueError(
                f"valid and valid_fraction ({self.valid_fraction:g}) both say what is held out; set one of them to null"
            )
        return self
