"""How long, how large, where and how precisely a run trains, and what it reports."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rwkv_train.config.base import Config

Strategy = Literal["auto", "ddp", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3"]

_NO_RUN_IS_THAT_LONG = 10**15  # steps or tokens; beyond it, counts of samples leave 64 bits
_LONGEST_WAIT = 10**9  # seconds; Python's waits leave 64 bits at ten times as many


class TrainerConfig(Config):
    """The run itself. Its length is exactly one of max_steps, max_tokens and max_epochs."""

    out_dir: Annotated[str, Field(min_length=1)]
    """Folder of the run: checkpoints, metrics, log, plot."""
    max_steps: Annotated[PositiveInt, Field(lt=_NO_RUN_IS_THAT_LONG)] | None = None
    """Length of the run in optimizer steps."""
    max_tokens: Annotated[PositiveInt, Field(lt=_NO_RUN_IS_THAT_LONG)] | None = None
    """Length of the run in tokens, rounded up to whole steps."""
    max_epochs: Annotated[PositiveFloat, Field(lt=1e6)] | None = None
    """Length of the run in passes over the training corpus, rounded up to whole steps."""
    global_batch_size: PositiveInt = 32
    """Samples in one optimizer step, over all devices and accumulated micro-batches."""
    micro_batch_size: PositiveInt = 8
    """Samples that one device computes at once; global_batch_size is reached by accumulation."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device: "auto" takes a GPU where there is one."""
    strategy: Strategy = "auto"
    """How devices share the work: "auto" (one process, or DDP), "ddp", "fsdp2", "deepspeed_1", "_2" or "_3"."""
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    """What lies in the CPU's memory: DeepSpeed's optimizer states, with stage 3 the parameters too."""
    deepspeed_config: str | None = None
    """A JSON file of DeepSpeed's own settings, merged over ours; what our settings decide must not be in it."""
    devices: PositiveInt = 1
    """Devices (processes) on each node."""
    num_nodes: PositiveInt = 1
    """Machines that train together."""
    precision: Literal["fp32", "bf16-autocast", "bf16-params"] = "fp32"
    """"fp32"; "bf16-autocast": matrix products in bfloat16; "bf16-params": the forward sees bfloat16 parameters."""
    compile: bool = False
    """Compile each block with torch.compile for training: a slower start, then faster steps. Not for deepspeed_3."""
    grad_checkpointing: bool = False
    """Keep only the inputs of each block and compute it again in the backward: less memory, a third more time."""
    wkv_backend: str = "auto"
    """Backend of the recurrence: "auto" (the fastest that fits), "cuda", "cuda_exact", "cpp", "torch" or "reference";
    of RWKV-7 also "cuda_bf16", faster and less precise than "cuda", which "auto" never takes."""
    seed: Annotated[NonNegativeInt, Field(lt=1 << 63)] = 42
    """Seed of the initial values, of the order of the data and of dropout."""
    hang_timeout_seconds: Annotated[PositiveFloat, Field(le=_LONGEST_WAIT)] = 600.0
    """Time after which a run of several processes ends that makes no step; above the time of any save."""
    grace_seconds: Annotated[PositiveFloat, Field(le=_LONGEST_WAIT)] = 60.0
    """Time that a run asked to stop may take for its step and its save; then it stops without."""
    log_every_n_steps: PositiveInt = 10
    """Steps between two rows of metrics."""
    val_every_n_steps: PositiveInt = 500
    """Steps between two validations; besides, one before the first step and one after the last."""
    val_tokens: PositiveInt = 1_048_576
    """Tokens scored in each validation: the head of every domain, in its share of the validation corpus."""
    early_stopping_patience: PositiveInt | None = None
    """Validations in a row without a better loss after which the run ends early; null: never."""
    sample_tokens: NonNegativeInt = 128
    """Tokens of the sample that each validation writes; 0: none."""
    sample_prompt: str = "\n"
    """Text that the samples start from."""
    tensorboard: bool = False
    """Also log metrics for TensorBoard (needs the extra rwkv-train[tensorboard])."""
    wandb_project: str | None = None
    """Also log metrics to this Weights & Biases project (WANDB_MODE=offline keeps them on this disk)."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        lengths = {"max_steps": self.max_steps, "max_tokens": self.max_tokens, "max_epochs": self.max_epochs}
        given = [f"{name} ({value:g})" for name, value in lengths.items() if value is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"set exactly one of max_steps, max_tokens and max_epochs; found {found}")
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        at_once = self.micro_batch_size * self.world_size
        if self.global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of {at_once}: "
                f"micro_batch_size ({self.micro_batch_size}) x devices ({self.devices}) x num_nodes ({self.num_nodes})"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_settings_need_deepspeed(self) -> Self:
        if self.zero_stage is None:
            if self.deepspeed_config is not None:
                raise ValueError(
                    f"deepspeed_config needs strategy deepspeed_1, _2 or _3, not {self.strategy!r}; set it to null"
                )
            if self.offload != "none":
                raise ValueError(
                    f"offload {self.offload!r} needs strategy deepspeed_1, _2 or _3, not {self.strategy!r}"
                )
        if self.offload == "optimizer_and_parameters" and self.zero_stage != 3:
            raise ValueError(
                f"offload {self.offload!r} needs strategy 'deepspeed_3', not {self.strategy!r}; "
                "set offload to 'optimizer'"
            )
        return self

    @model_validator(mode="after")
    def _gathered_layers_cannot_be_compiled(self) -> Self:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile cannot take strategy 'deepspeed_3', which cuts blocks into pieces where it gathers the "
                "parameters of each layer; set the strategy to 'fsdp2', or compile to false"
            )
        return self

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's ZeRO stage; ``None`` under other strategies."""
        return int(self.strategy.removeprefix("deepspeed_")) if "deepspeed" in self.strategy else None

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds parts of parameters, so that all must call the model equally often."""
        return self.strategy in {"fsdp2", "deepspeed_3"}

    @property
    def run_folder(self) -> Path:
        """``out_dir`` as a path, with ``~`` resolved."""
        return Path(self.out_dir).expanduser()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes

    @property
    def accumulation(self) -> int:
        """Micro-batches that each device accumulates for one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)
