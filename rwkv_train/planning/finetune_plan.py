"""The plan of a finetuning run: everything is checked that can be in seconds, and all problems are named together."""

from collections.abc import Collection
from typing import NamedTuple

import torch

from rwkv_train.checkpoints.training_state import TrainingCheckpoint
from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.preview import DatasetSummary, Preview, summarize
from rwkv_train.errors import CheckpointError, RwkvTrainError
from rwkv_train.finetuning.base import read_base
from rwkv_train.finetuning.method import keeps_base
from rwkv_train.parallel.processes import Processes
from rwkv_train.planning.finetune_course import Course, check_folder, check_space, follow
from rwkv_train.planning.finetune_data import read_data
from rwkv_train.planning.finetune_model import Learning, apply_to_shapes, describe_learning
from rwkv_train.planning.memory import MemoryEstimate, estimate_memory
from rwkv_train.planning.plan import devices_row, memory_row, show_bytes, tokens_row
from rwkv_train.planning.problems import Problems
from rwkv_train.planning.speed import Speed, measure_speed
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training.backend import choose_wkv_backend
from rwkv_train.training.conversation_task import ConversationTask
from rwkv_train.training.finetuning import make_finetuning_task
from rwkv_train.training.loggers import require_tensorboard
from rwkv_train.training.preference_task import PreferenceTask
from rwkv_train.training.resume import AUTO, find_checkpoint
from rwkv_train.training.strategy import device_of
from rwkv_train.training.zero_settings import deepspeed_config

Row = tuple[str, str]


class FinetunePlan(NamedTuple):
    """What the settings of a finetuning run come to."""

    config: FinetuneConfig
    data: Preview
    """What it learns from, after the held-out part was taken out."""
    learning: Learning
    course: Course
    memory: MemoryEstimate
    speed: Speed | None
    """``None`` where the model is too large to be tried out in seconds."""
    device: torch.device
    backend: str
    """Why the backend of the recurrence was chosen."""

    @property
    def train_seconds(self) -> float | None:
        """Time of the steps that are still to be done."""
        if self.speed is None:
            return None
        tokens = self.course.n_steps * self.course.length.tokens_per_step
        return tokens * self.speed.train_seconds / self.config.trainer.world_size

    @property
    def other_seconds(self) -> float | None:
        """Time of validations without their answers, and of the pass before the run that DPO needs."""
        if self.speed is None:
            return None
        tokens = self.course.n_validations * self.course.n_held_out_tokens + self.course.n_compared_tokens
        return tokens * self.speed.forward_seconds / self.config.trainer.world_size

    def rows(self) -> list[Row]:
        """Return the plan as names and values for a table."""
        trainer = self.config.trainer
        return [
            *self._model_rows(),
            *self._data_rows(),
            tokens_row(self.course.length.tokens_per_step, trainer.accumulation),
            *self._course_rows(),
            devices_row(trainer.world_size, self.device),
            memory_row(self.memory),
            ("recurrence", self.backend),
            ("time (estimate)", self._time()),
        ]

    def _model_rows(self) -> list[Row]:
        model, method, learning = self.config.model, self.config.finetune, self.learning
        name = method.method if method.method != "lora" else method.variant
        where = f" beside {learning.n_adapted} linear layers" if learning.n_adapted else ""
        rows = [
            ("base", f"{model.init_from}: {model.arch}, {model.n_layer} layers of width {model.n_embd}"),
            ("parameters", f"{learning.n_parameters:,}"),
            (
                "parameters that learn",
                f"{learning.n_trained:,} ({learning.n_trained / learning.n_parameters:.2%}), method {name}{where}",
            ),
        ]
        if learning.n_quantized:
            saved = f"{learning.n_quantized} linear layers, {show_bytes(learning.saved_bytes)} less than in float32"
            rows.append(("quantized", saved))
        return rows

    def _data_rows(self) -> list[Row]:
        data = self.data
        rows = [row for dataset in data.datasets for row in _dataset_rows(dataset)]
        bins = ", ".join(f"up to {limit:,}: {count:,}" for limit, count in data.histogram)
        rows.append(("samples by tokens", bins))
        n_segmented = sum(dataset.n_segmented for dataset in data.datasets)
        if n_segmented:
            rows.append(
                ("longer than a row", f"{n_segmented:,}, read in segments of {data.ctx_len:,} tokens")
            )
        filled = data.n_tokens / (data.n_rows * data.ctx_len)
        rows.append(("rows an epoch", f"{data.n_rows:,} of {data.ctx_len:,} tokens, {filled:.1%} filled"))
        rows += [
            (
                f"held out of {one.name}",
                f"{one.n_samples:,} samples, {one.n_learned:,} tokens scored each time",
            )
            for one in self.course.held_out
        ]
        return rows

    def _course_rows(self) -> list[Row]:
        course, optim, checkpoint = self.course, self.config.optim, self.config.checkpoint
        n_steps, total = course.length.n_steps, course.length.n_steps * course.length.tokens_per_step
        warmup = f", of which {optim.warmup_steps:,} warm up" if optim.warmup_steps else ""
        if optim.warmup_steps >= n_steps:
            warmup = f", and all of them warm up: optim.warmup_steps is {optim.warmup_steps:,}"
        rows = [("steps", f"{n_steps:,}{warmup}"), ("tokens in all", f"{total:,}")]
        if course.first_step:
            rows.append(("goes on", f"after step {course.first_step:,}, {course.n_steps:,} are left"))
        rows += [(f"epochs of {name}", f"{epochs:.2f}") for name, epochs in course.epochs]
        size = show_bytes(self.learning.checkpoint_bytes)
        kept = f"every {checkpoint.every_n_steps:,} steps, up to {size} each, at most {course.n_checkpoints} at once"
        rows.append(("checkpoints", kept))
        return rows

    def _time(self) -> str:
        if self.train_seconds is None or self.other_seconds is None:
            return "unknown: two layers of this model are too large to be tried out in seconds"
        text = f"about {_duration(self.train_seconds)} of training"
        if self.other_seconds:
            text += f" and {_duration(self.other_seconds)} of scoring, without the answers to prompts"
        return text


class Verdict(NamedTuple):
    """What became of the attempt to plan a run."""

    plan: FinetunePlan | None
    """``None`` where there is a problem."""
    problems: tuple[RwkvTrainError, ...]
    """Everything that the run would be refused for."""


def make_finetune_plan(
    config: FinetuneConfig,
    unreadable: CheckpointError | None = None,
    resume: str = AUTO,
    allow_change: Collection[str] = (),
) -> Verdict:
    """Check a run and work out its plan. Nothing is written, and of the weights only names and shapes are read.

    So what depends on their values is not noticed: numbers that are not finite, and matrices of zeros that PiSSA and
    DoRA cannot start from. Nor is the base compared with that of a run that goes on.

    Args:
        config: the settings of the run.
        unreadable: why the base cannot be read; ``config.model`` has made-up sizes then.
        resume: where the run would go on from.
        allow_change: settings that may differ from those of the checkpoint.
    """
    problems = Problems()
    if unreadable is not None:
        problems.add(unreadable)
    trainer = config.trainer
    device = problems.of(device_of, trainer) or torch.device("cuda")
    if trainer.zero_stage is not None:
        problems.of(deepspeed_config, config, device)
    if trainer.tensorboard:
        problems.of(require_tensorboard)
    can_write = problems.passes(check_folder, trainer.run_folder)

    tokenizer = problems.of(load_tokenizer, config.data.tokenizer)
    split = read_data(config, tokenizer, problems)
    task = course = saved = None
    if split is not None and tokenizer is not None:
        task = make_finetuning_task(config, tokenizer, split)
        # The prompts are written by the template.
        problems.of(task.make_validator, Processes(), lambda: None)
        if unreadable is None and can_write:
            saved = problems.of(_find_checkpoint, task, resume, allow_change)
        course = problems.of(follow, task, 0 if saved is None else saved.manifest["step"])

    model = backend = learning = None
    if unreadable is None:
        backend = problems.of(choose_wkv_backend, config, device)
        if tokenizer is not None and (saved is None or keeps_base(config.finetune)):
            problems.of(read_base, config, tokenizer)
        model = apply_to_shapes(config, tokenizer, "auto" if backend is None else backend.name, problems)
    if model is not None:
        learning = describe_learning(config, model)
        if can_write and course is not None:
            # A run that goes on has its checkpoints there already.
            n_checkpoints = course.n_checkpoints if saved is None else 1
            problems.of(check_space, config, learning.checkpoint_bytes, n_checkpoints)
    if problems.found:
        return Verdict(None, tuple(problems.found))
    assert split is not None
    assert tokenizer is not None
    assert backend is not None
    assert model is not None
    assert learning is not None
    assert course is not None
    plan = FinetunePlan(
        config=config,
        data=summarize(split.train, config.model.ctx_len),
        learning=learning,
        course=course,
        memory=estimate_memory(config, backend.name, model, course.n_sequences),
        speed=measure_speed(config, backend.name, device, tokenizer.encode),
        device=device,
        backend=backend.reason,
    )
    return Verdict(plan, ())


def _find_checkpoint(
    task: ConversationTask | PreferenceTask, resume: str, allow_change: Collection[str]
) -> TrainingCheckpoint | None:
    identity = task.tokenizer.identity
    return find_checkpoint(resume, task.config, identity, task.source.identity, Processes(), allow_change)


def _dataset_rows(dataset: DatasetSummary) -> list[Row]:
    rows = [
        (
            f"data: {dataset.path}",
            f"{dataset.n_kept:,} of {dataset.n_records:,} records to learn from, {dataset.n_tokens:,} tokens, "
            f"{dataset.n_learned:,} learned, the longest sample {dataset.longest:,}",
        )
    ]
    rows += [
        (f"left out of {dataset.path}", f"{count:,}: {reason}, such as {dataset.examples[reason][0]}")
        for reason, count in dataset.left_out.items()
    ]
    return rows


def _duration(seconds: float) -> str:
    """Say a time in its largest unit, with two digits."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} seconds"
