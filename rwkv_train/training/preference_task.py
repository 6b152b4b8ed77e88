"""Finetuning on pairs of answers, of which one is preferred."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.training_state import TrainingCheckpoint
from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.batches import InstructSamples
from rwkv_train.data.instruct.pair_batches import PairBatches
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.split import Split, head_of
from rwkv_train.data.module import Position
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.finetuning.preferences import PairValues
from rwkv_train.finetuning.reference import (
    REFERENCE_FILE,
    ReferenceLogProbs,
    compute_reference,
    fingerprint_of,
    load_reference,
    save_reference,
)
from rwkv_train.models.lm import LanguageModel
from rwkv_train.ops.context import packed_context
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.finetuning_task import FinetuningTask
from rwkv_train.training.objective import Objective
from rwkv_train.training.pair_validation import PairValidator
from rwkv_train.training.precision import as_under_any_strategy
from rwkv_train.training.preference_objective import PreferenceObjective
from rwkv_train.training.strategy import device_of

logger = logging.getLogger(__name__)


class PreferenceTask(FinetuningTask):
    """Learn which of two answers is better.

    Args:
        config: the settings of the run, with a section ``preference``.
        tokenizer: the model's.
        split: the pairs.
    """

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer, split: Split[PreferencePair]) -> None:
        super().__init__(config, tokenizer)
        assert config.preference is not None
        datasets = [one.samples for one in split.train]
        self.samples: InstructSamples[PreferencePair] = InstructSamples(
            datasets, [fingerprint_of([dataset]) for dataset in datasets], config
        )
        self.valid: dict[str, list[PreferencePair]] = head_of(split.valid, config.trainer.val_tokens)
        self.held_out = {name: fingerprint_of([held]) for name, held in self.valid.items()} or None
        self.objective: Objective = PreferenceObjective(config.preference)
        self._needs_reference = config.preference.loss == "dpo"
        self._reference: ReferenceLogProbs | None = None

    def prepare(self, model: LanguageModel, processes: Processes, beat: Callable[[], None]) -> None:
        """Compute the log-probabilities of all answers under the model before the run, or read what was kept.

        Raises:
            CheckpointError: they are of other pairs or another model, or cannot be read or written.
            ConfigError: a run that goes on has other pairs held out.
        """
        if not self._needs_reference:
            return
        datasets = [*self.samples.datasets, *self.valid.values()]
        data, base = fingerprint_of(datasets), self._reference_model()
        with processes.failing_together():
            if self._resumed is not None:
                self._require_same_held_out(self._resumed)
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
        if not self.valid:
            return None
        reference = None
        if self._reference is not None:
            kept = self._reference.datasets[len(self.samples.datasets) :]
            reference = dict(zip(self.valid, kept, strict=True))
        return PairValidator(
            self.valid, reference, self.objective, self.tokenizer, self.config, processes, beat
        )

    def add_files(self, folder: Path, learned: Mapping[str, Tensor], step: int) -> None:
        """Add what was learned, and the log-probabilities that a resumed run needs."""
        super().add_files(folder, learned, step)
        if self._reference is not None:
            save_reference(folder / REFERENCE_FILE, self._reference)

    def _reference_model(self) -> str:
        """Return what the model before the run is known by; weights that are rounded differently are another one."""
        assert self._base is not None
        quantize = getattr(self.config.finetune, "quantize", "none")
        return self._base if quantize == "none" else f"{self._base} in {quantize}"

    def _require_same_held_out(self, saved: TrainingCheckpoint) -> None:
        """Refuse other held-out pairs than those whose log-probabilities are kept; here the model has learned."""
        memory = saved.manifest.get("early_stopping") or {}
        if memory.get("held_out", self.held_out) != self.held_out:
            raise ConfigError(
                f"data.valid or trainer.val_tokens hold out other pairs than {saved.folder} has log-probabilities of; "
                "set them back to go on with that run, or choose another trainer.out_dir for a new one"
            )

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
            with as_under_any_strategy(model, self.config.trainer.precision, device):
                # From the empty state: a start that learns is not of the model before the run.
                empty = model.zero_state(len(cu_seqlens) - 1, device)
                output = model(tokens, state=empty, targets=targets, context=packed_context(cu_seqlens))
            losses: Tensor = output.losses
            return losses

        ctx_len = self.config.model.ctx_len
        shares = [range(processes.rank, len(pairs), processes.world_size) for pairs in datasets]
        found = [
            compute_reference(losses_of, pairs, numbers, ctx_len, device=device)
            for pairs, numbers in zip(datasets, shares, strict=True)
        ]
        model.train().to("cpu")  # where a strategy expects it
        return found


def _interleave(shares: list[PairValues], count: int) -> PairValues:
    """Put together what each process has of every so-manieth pair."""
    whole = PairValues(torch.empty(count), torch.empty(count))
    for rank, share in enumerate(shares):
        for values, part in zip(whole, share, strict=True):
            values[rank :: len(shares)] = part
    return whole
