"""The settings of one finetuning run: the tree that a YAML file holds."""

from typing import Any, Self

from pydantic import Field, model_validator

from rwkv_train.config.instruct import InstructDataConfig
from rwkv_train.config.methods import LoraMethod, Method
from rwkv_train.config.preference import PreferenceConfig
from rwkv_train.config.run import RunConfig


class FinetuneConfig(RunConfig):
    """One run of ``rwkv-train finetune``."""

    data: InstructDataConfig
    """The conversations."""
    finetune: Method
    """What learns."""
    preference: PreferenceConfig | None = None
    """Learn which of two answers is better; null: learn the answers."""
    prompts: list[str] = Field(default_factory=list)
    """What a user says; each validation writes what the model answers, in at most trainer.sample_tokens tokens."""

    @model_validator(mode="before")
    @classmethod
    def _pairs_have_no_penalty_unless_it_is_asked_for(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("preference") is None:
            return tree
        optim = tree.get("optim") or {}
        return {**tree, "optim": {"l2wrap": 0.0, **optim}} if isinstance(optim, dict) else tree

    @property
    def has_validation(self) -> bool:
        """Whether anything is held out."""
        return self.data.valid is not None or self.data.valid_fraction is not None

    @property
    def lr_factors(self) -> dict[str, float]:
        """Factors of the learning rate by patterns of parameters' names; the last that fits counts."""
        return getattr(self.finetune, "lr_factors", {})

    @model_validator(mode="after")
    def _it_starts_from_weights(self) -> Self:
        if self.model.init_from is None:
            raise ValueError(
                "model.init_from must be set: the weights to finetune, a path or hf:OWNER/NAME/FILE"
            )
        return self

    @model_validator(mode="after")
    def _patience_needs_validation(self) -> Self:
        if self.trainer.early_stopping_patience is not None and not self.has_validation:
            raise ValueError(
                f"trainer.early_stopping_patience ({self.trainer.early_stopping_patience}) needs held-out data; set "
                "data.valid or data.valid_fraction, or the patience to null"
            )
        return self

    @model_validator(mode="after")
    def _prompts_need_validation(self) -> Self:
        if "sample_prompt" in self.trainer.model_fields_set:
            raise ValueError("trainer.sample_prompt is of pretraining; set prompts to what a user says")
        if self.prompts and not self.has_validation:
            raise ValueError(
                "prompts are answered at each validation, and nothing is held out; set data.valid or "
                "data.valid_fraction"
            )
        if self.prompts and self.trainer.sample_tokens == 0:
            raise ValueError("prompts need trainer.sample_tokens above 0, the length of an answer")
        return self

    @model_validator(mode="after")
    def _data_are_of_the_loss(self) -> Self:
        for name, datasets in (("datasets", self.data.datasets), ("valid", self.data.valid or [])):
            for dataset in datasets:
                if (dataset.format == "preference") != (self.preference is not None):
                    raise ValueError(
                        f"data.{name} has {dataset.path!r} of format {dataset.format!r}, and the section preference is "
                        f"{'not set' if self.preference is None else 'set'}; pairs of the format 'preference' and that "
                        "section belong together"
                    )
        return self

    @model_validator(mode="after")
    def _epochs_need_one_dataset(self) -> Self:
        if self.trainer.max_epochs is not None and len(self.data.datasets) > 1:
            raise ValueError(
                f"trainer.max_epochs ({self.trainer.max_epochs:g}) has no meaning with several datasets mixed by "
                "weight; set trainer.max_steps or max_tokens"
            )
        return self

    @model_validator(mode="after")
    def _a_loop_over_conversations_cannot_be_compiled(self) -> Self:
        if self.trainer.compile and self.trainer.wkv_backend == "reference":
            raise ValueError(
                "trainer.compile cannot take trainer.wkv_backend 'reference' with packed rows, a loop whose length "
                "depends on the data; set the backend to 'auto', or compile to false"
            )
        return self

    @model_validator(mode="after")
    def _dora_cannot_be_compiled(self) -> Self:
        if self.trainer.compile and isinstance(self.finetune, LoraMethod) and self.finetune.variant == "dora":
            raise ValueError(
                "trainer.compile cannot take finetune.variant 'dora', whose layers PyTorch cannot trace whole; set the "
                "variant to 'lora', or compile to false"
            )
        return self

    @model_validator(mode="after")
    def _pairs_have_no_penalty(self) -> Self:
        if self.preference is not None and self.optim.l2wrap > 0:
            raise ValueError(
                f"optim.l2wrap ({self.optim.l2wrap:g}) is a penalty on learned tokens, and the section preference "
                "learns from pairs; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _what_is_new_is_small(self) -> Self:
        sharded = self.trainer.is_sharded
        if sharded and self.finetune.method in ("state", "prefix"):
            raise ValueError(
                f"trainer.strategy {self.trainer.strategy!r} shares out parameters, and the few of method "
                f"{self.finetune.method!r} are needed whole; set the strategy to 'ddp', 'deepspeed_1' or 'deepspeed_2'"
            )
        if sharded and getattr(self.finetune, "quantize", "none") != "none":
            raise ValueError(
                f"trainer.strategy {self.trainer.strategy!r} cannot share out quantized weights; set the strategy to "
                "'ddp', 'deepspeed_1' or 'deepspeed_2', or finetune.quantize to 'none'"
            )
        return self
