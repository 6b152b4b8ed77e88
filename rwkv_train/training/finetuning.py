"""Finetuning from settings to summary."""

from collections.abc import Collection

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.training.conversation_task import ConversationTask
from rwkv_train.training.preference_task import PreferenceTask
from rwkv_train.training.resume import AUTO
from rwkv_train.training.run import RunSummary, run_task


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


def open_finetuning_task(config: FinetuneConfig) -> ConversationTask | PreferenceTask:
    """Read the data of a run.

    Raises:
        DataError: they cannot be used.
    """
    return ConversationTask(config) if config.preference is None else PreferenceTask(config)
