"""Finetuning: conversations or pairs of them, and the parameters that the method learns."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.adapter_note import AdapterNote
from rwkv_train.checkpoints.descriptions import Json
from rwkv_train.checkpoints.fingerprint import fingerprint
from rwkv_train.checkpoints.infer import make_explicit
from rwkv_train.checkpoints.manifest import Shapes
from rwkv_train.checkpoints.training_state import TrainingCheckpoint
from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.config.methods import FreezeMethod, FullMethod
from rwkv_train.data.instruct.batches import ConversationBatches, InstructSamples, hash_of
from rwkv_train.data.instruct.pair_batches import PairBatches
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.reading import read_conversations, read_pairs
from rwkv_train.data.instruct.split import head_of, read_split
from rwkv_train.data.instruct.tokens import TokenizedConversation
from rwkv_train.data.module import DataSource, Position
from rwkv_train.errors import CheckpointError
from rwkv_train.finetuning.base import read_base
from rwkv_train.finetuning.freezing import require_learning
from rwkv_train.finetuning.method import apply_method, keeps_base, own_shapes_of, write_learned
from rwkv_train.finetuning.preferences import PairValues
from rwkv_train.finetuning.quantized import load_quantized
from rwkv_train.finetuning.reference import (
    REFERENCE_FILE,
    ReferenceLogProbs,
    compute_reference,
    fingerprint_of,
    load_reference,
    save_reference,
)
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model
from rwkv_train.ops.context import packed_context
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training.conversation_validation import ConversationValidator
from rwkv_train.training.objective import NextTokenLoss, Objective
from rwkv_train.training.pair_validation import PairValidator
from rwkv_train.training.precision import autocast_of
from rwkv_train.training.preference_objective import PreferenceObjective
from rwkv_train.training.resume import AUTO
from rwkv_train.training.run import RunSummary, run_task
from rwkv_train.training.schedule import RunLength, length_of
from rwkv_train.training.strategy import device_of

logger = logging.getLogger(__name__)


def run_finetuning(
    config: FinetuneConfig, resume: str = AUTO, allow_change: Collection[str] = ()
) -> RunSummary:
    """Finetune a model as the settings say, or go on from where an earlier process was stopped.

    Args:
        config: the settings of the run.
        resume: as in :func:`~rwkv_train.training.run.run_pretraining`.
        allow_change: as there.

    Raises:
        RwkvTrainError: as there; the data, the base or the method do not fit each other.
    """
    return run_task(config, lambda: open_finetuning_task(config), resume, allow_change)


def open_finetuning_task(config: FinetuneConfig) -> "ConversationTask | PreferenceTask":
    """Read the data of a run.

    Raises:
        DataError: they cannot be used.
    """
    return ConversationTask(config) if config.preference is None else PreferenceTask(config)


class FinetuningTask:
    """The task of ``rwkv-train finetune``, but for its data; see :class:`~rwkv_train.training.task.Task`.

    Args:
        config: the settings of the run.
    """

    held_out: dict[str, object] | None
    samples: InstructSamples[TokenizedConversation] | InstructSamples[PreferencePair]

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.data.tokenizer)
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


class ConversationTask(FinetuningTask):
    """Learn from conversations.

    Args:
        config: the settings of the run, without a section ``preference``.

    Raises:
        DataError: the conversations cannot be used.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        split = read_split(
            lambda data: read_conversations(data, self.tokenizer), config.data, config.trainer.seed
        )
        datasets = [one.samples for one in split.train]
        self.samples: InstructSamples[TokenizedConversation] = InstructSamples(
            datasets, [hash_of(dataset) for dataset in datasets], config
        )
        self._valid = head_of(split.valid, config.trainer.val_tokens)
        self.held_out = {name: hash_of(held) for name, held in self._valid.items()} or None
        self.objective: Objective = NextTokenLoss()

    def prepare(self, model: LanguageModel, processes: Processes, beat: Callable[[], None]) -> None:
        """Do nothing."""

    def batches(self, rank: int, start: Position, n_steps: int) -> ConversationBatches:
        """Return the micro-batches of a process, from a position to the end of the run."""
        return ConversationBatches(self.samples, self.config, rank, start, n_steps)

    def make_validator(self, processes: Processes, beat: Callable[[], None]) -> ConversationValidator | None:
        """Return what scores the held-out conversations, if there are any."""
        if not self._valid:
            return None
        return ConversationValidator(self._valid, self.tokenizer, self.config, processes, beat)


class PreferenceTask(FinetuningTask):
    """Learn which of two answers is better.

    Args:
        config: the settings of the run, with a section ``preference``.

    Raises:
        DataError: the pairs cannot be used.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        assert config.preference is not None
        split = read_split(
            lambda data: read_pairs(data, self.tokenizer, config.model.ctx_len),
            config.data,
            config.trainer.seed,
        )
        datasets = [one.samples for one in split.train]
        self.samples: InstructSamples[PreferencePair] = InstructSamples(
            datasets, [fingerprint_of([dataset]) for dataset in datasets], config
        )
        self._valid = head_of(split.valid, config.trainer.val_tokens)
        self.held_out = {name: fingerprint_of([held]) for name, held in self._valid.items()} or None
        self.objective: Objective = PreferenceObjective(config.preference)
        self._needs_reference = config.preference.loss == "dpo"
        self._reference: ReferenceLogProbs | None = None

    def prepare(self, model: LanguageModel, processes: Processes, beat: Callable[[], None]) -> None:
        """Compute the log-probabilities of all answers under the model before the run, or read what was kept.

        Raises:
            CheckpointError: they are of other pairs or another model, or cannot be read or written.
        """
        if not self._needs_reference:
            return
        datasets = [*self.samples.datasets, *self._valid.values()]
        data, base = fingerprint_of(datasets), self._base
        assert base is not None
        with processes.failing_together():
            folder = self.config.trainer.run_folder if self._resumed is None else self._resumed.folder
            self._reference = load_reference(folder / REFERENCE_FILE, data=data, base=base)
            if self._reference is None and self._resumed is not None:
                raise CheckpointError(
                    f"{folder / REFERENCE_FILE} is missing, which has the log-probabilities of the model before the "
                    "run; restore it, or go on from another checkpoint"
                )
        if self._reference is not None:
            return
        logger.info("computing the log-probabilities of %d pairs before the run", sum(map(len, datasets)))
        own: list[PairValues] = []
        with processes.failing_together():
            own = self._compute(model, datasets, processes, beat)
        shares = processes.gather(own)
        whole = tuple(
            _interleave([share[number] for share in shares], len(pairs))
            for number, pairs in enumerate(datasets)
        )
        self._reference = ReferenceLogProbs(whole, data, base)
        with processes.failing_together():
            if processes.is_first:
                save_reference(self.config.trainer.run_folder / REFERENCE_FILE, self._reference)

    def batches(self, rank: int, start: Position, n_steps: int) -> PairBatches:
        """Return the micro-batches of a process, from a position to the end of the run."""
        reference = (
            None if self._reference is None else self._reference.datasets[: len(self.samples.datasets)]
        )
        return PairBatches(self.samples, reference, self.config, rank, start, n_steps)

    def make_validator(self, processes: Processes, beat: Callable[[], None]) -> PairValidator | None:
        """Return what scores the held-out pairs, if there are any."""
        if not self._valid:
            return None
        reference = None
        if self._reference is not None:
            kept = self._reference.datasets[len(self.samples.datasets) :]
            reference = dict(zip(self._valid, kept, strict=True))
        return PairValidator(
            self._valid, reference, self.objective, self.tokenizer, self.config, processes, beat
        )

    def add_files(self, folder: Path, learned: Mapping[str, Tensor], step: int) -> None:
        """Add what was learned, and the log-probabilities that a resumed run needs."""
        super().add_files(folder, learned, step)
        if self._reference is not None:
            save_reference(folder / REFERENCE_FILE, self._reference)

    def _compute(
        self,
        model: LanguageModel,
        datasets: Sequence[Sequence[PreferencePair]],
        processes: Processes,
        beat: Callable[[], None],
    ) -> list[PairValues]:
        """Return the log-probabilities of every so-manieth pair of each dataset."""
        kind = device_of(self.config.trainer)
        device = kind if kind.type == "cpu" else torch.device(kind.type, processes.local_rank)
        model.to(device).eval()

        def losses_of(tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
            beat()
            # From the empty state: a start that learns is not of the model before the run.
            empty = model.zero_state(len(cu_seqlens) - 1, device)
            with autocast_of(self.config.trainer.precision, device):
                output = model(tokens, state=empty, targets=targets, context=packed_context(cu_seqlens))
            losses: Tensor = output.losses
            return losses

        ctx_len = self.config.model.ctx_len
        shares = [range(processes.rank, len(pairs), processes.world_size) for pairs in datasets]
        found = [
            compute_reference(losses_of, pairs, numbers, ctx_len, device=device)
            for pairs, numbers in zip(datasets, shares, strict=True)
        ]
        model.train()
        return found


def _interleave(shares: list[PairValues], count: int) -> PairValues:
    """Put together what each process has of every so-manieth pair."""
    whole = PairValues(torch.empty(count), torch.empty(count))
    for rank, share in enumerate(shares):
        for values, part in zip(whole, share, strict=True):
            values[rank :: len(shares)] = part
    return whole
