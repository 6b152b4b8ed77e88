"""The settings of one pretraining run: the tree that a YAML file holds."""

from typing import Self

from pydantic import Field, model_validator

from rwkv_train.config.data import DataConfig
from rwkv_train.config.run import RunConfig


class TrainConfig(RunConfig):
    """One run of ``rwkv-train pretrain``."""

    data: DataConfig = Field(default_factory=DataConfig)
    """The corpus."""

    @property
    def is_packed(self) -> bool:
        """Whether a sample holds several sequences, each with a state of its own."""
        return self.data.documents == "reset"

    @model_validator(mode="after")
    def _a_model_starts_from_somewhere(self) -> Self:
        if self.model.init_from is None and self.model.why_not_from_scratch is not None:
            raise ValueError(f"model.{self.model.why_not_from_scratch}")
        return self

    @model_validator(mode="after")
    def _epochs_need_one_corpus(self) -> Self:
        if self.trainer.max_epochs is not None and not isinstance(self.data.train, str):
            found = "data.streaming" if self.data.train is None else "several corpora in data.train"
            raise ValueError(
                f"trainer.max_epochs ({self.trainer.max_epochs:g}) has no meaning with {found}; set trainer.max_steps "
                "or max_tokens"
            )
        return self

    @model_validator(mode="after")
    def _patience_needs_validation(self) -> Self:
        if self.trainer.early_stopping_patience is not None and self.data.valid is None:
            raise ValueError(
                f"trainer.early_stopping_patience ({self.trainer.early_stopping_patience}) needs a corpus for "
                "validation; set data.valid, or the patience to null"
            )
        return self

    @model_validator(mode="after")
    def _a_loop_over_documents_cannot_be_compiled(self) -> Self:
        settings = self.trainer
        if settings.compile and settings.wkv_backend == "reference" and self.is_packed:
            raise ValueError(
                "trainer.compile cannot take trainer.wkv_backend 'reference' with data.documents 'reset', a loop whose "
                "length depends on the data; set the backend to 'auto', or compile to false"
            )
        return self
