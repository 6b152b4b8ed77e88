"""What finetuning on conversations and on pairs of them have in common: the base, and what the method learns."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rwkv_train.checkpoints.adapter_note import AdapterNote
from rwkv_train.checkpoints.descriptions import Json
from rwkv_train.checkpoints.fingerprint import fingerprint
from rwkv_train.checkpoints.infer import make_explicit
from rwkv_train.checkpoints.manifest import Shapes
from rwkv_train.checkpoints.training_state import TrainingCheckpoint
from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.config.methods import FreezeMethod, FullMethod
from rwkv_train.data.instruct.batches import InstructSamples
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.data.module import DataSource
from rwkv_train.errors import CheckpointError
from rwkv_train.finetuning.base import read_base
from rwkv_train.finetuning.freezing import require_learning
from rwkv_train.finetuning.method import apply_method, keeps_base, own_shapes_of, write_learned
from rwkv_train.finetuning.quantized import load_quantized
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.schedule import RunLength, length_of


class FinetuningTask:
    """The task of ``rwkv-train finetune``, but for its data; see :class:`~rwkv_train.training.task.Task`.

    Args:
        config: the settings of the run.
        tokenizer: the model's.
    """

    held_out: dict[str, object] | None
    valid: dict[str, list[TokenizedConversation]] | dict[str, list[PreferencePair]]
    """What each validation scores, by the name of its dataset."""
    samples: InstructSamples[TokenizedConversation] | InstructSamples[PreferencePair]

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.learned: Shapes | None = None
        self._model: LanguageModel | None = None
        self._base: str | None = None  # fingerprint, where a run needs it
        self._resumed: TrainingCheckpoint | None = None

    @property
    def source(self) -> DataSource:
        """The training data."""
        return self.samples

    def run_length(self) -> RunLength:
        """Return the length of the whole run."""
        epochs = self.config.trainer.max_epochs
        n_steps = None if epochs is None else self.samples.dealer.n_steps(epochs)
        return length_of(self.config.trainer, self.config.model.ctx_len, n_steps)

    def go_to(self, first_sample: int, saved: TrainingCheckpoint | None) -> None:
        """Do nothing: rows are found by their step."""

    def make_model(self, wkv_backend: str, saved: TrainingCheckpoint | None) -> LanguageModel:
        """Build the base and let the method take hold of it.

        Raises:
            CheckpointError: the base cannot be read, or is not that of the checkpoint.
            ConfigError: base, tokenizer and method do not fit each other.
        """
        method, seed = self.config.finetune, self.config.trainer.seed
        self._resumed = saved
        quantize = "none" if isinstance(method, FullMethod | FreezeMethod) else method.quantize
        model = build_model(
            self.config.model, wkv_backend=wkv_backend, device="cpu" if quantize == "none" else "meta"
        )
        if saved is not None and not keeps_base(method):
            model.load_state_dict(saved.weights())
            self._base = saved.manifest.get("base")
        else:
            weights = read_base(self.config, self.tokenizer)
            self._base = fingerprint(weights.tensors)
            if quantize == "none":
                model.load_state_dict(weights.tensors)
            else:  # on the CPU: on the same device the same weights have the same codes
                load_quantized(model, weights.tensors, quantize, "cpu")
        learned = None
        if saved is not None and keeps_base(method):
            self._require_same_base(saved)
            learned = saved.weights()
        apply_method(model, method, self.tokenizer.encode, seed, learned)
        require_learning("finetune.lr_factors", self.config.lr_factors, model)
        if keeps_base(method):
            self.learned = own_shapes_of(model)
        self._model = model
        return model

    def manifest(self, n_samples: int) -> tuple[Json, Mapping[str, Tensor]]:
        """Return the fingerprint of the base, and what was learned beside it."""
        sections: Json = {"base": self._base}
        if self.learned is not None:
            sections["learned"] = {
                "method": self.config.finetune.method,
                "base": {"init_from": self.config.model.init_from, "fingerprint": self._base},
                "parameters": {name: list(shape) for name, shape in self.learned.items()},
            }
        return sections, {}

    def add_files(self, folder: Path, learned: Mapping[str, Tensor], step: int) -> None:
        """Write what was learned as other programs read it, unless it is the model itself."""
        if self.learned is None:
            return
        assert self._model is not None
        assert self._base is not None
        note = AdapterNote(
            base=self._base,
            model=make_explicit(self.config.model),
            tokenizer=self.tokenizer.identity,
            template=self.config.data.template,
            step=step,
        )
        write_learned(folder, self._model, self.config.finetune, learned, note)

    def _require_same_base(self, saved: TrainingCheckpoint) -> None:
        found = saved.manifest["learned"]["base"].get("fingerprint")
        if found != self._base:
            raise CheckpointError(
                f"model.init_from ({self.config.model.init_from}) is not the base of {saved.folder}: its fingerprint "
                f"is {self._base}, and that of the base {found}; give the weights that the run began with"
            )
