"""Where metrics go: a CSV file always, TensorBoard and Weights & Biases by setting."""

import csv
import secrets
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from rwkv_train.checkpoints.descriptions import read_json, write_json
from rwkv_train.checkpoints.io import new_file
from rwkv_train.config.run import RunConfig
from rwkv_train.config.save import to_tree
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.training.validation import Answer

METRICS_FILE = "metrics.csv"
WANDB_FILE = "wandb.json"
"""Which run at Weights & Biases an out_dir belongs to."""


class MetricsFile(Logger):
    """One row a report in ``out_dir/metrics.csv``, which outlives interruptions.

    Lightning's own CSV logger deletes the file of an earlier process; this one goes on with it, without
    the rows of steps that are about to be done again.

    Args:
        path: the file.
        columns: names of the metrics; ``step`` comes first. Further columns of an earlier process stay.
        start_step: steps that are done; later rows of an earlier process are dropped, and all where none is done.
    """

    def __init__(self, path: Path, columns: Sequence[str], start_step: int) -> None:
        super().__init__()
        self._path = path
        # A run from scratch scores its first weights anew, so row 0 would stand there twice.
        kept = [row for row in read_metrics(path) if int(row["step"]) <= start_step] if start_step else []
        # A set that keeps its order: a run may go on without validation, or with that of other domains.
        self._columns = list(dict.fromkeys(["step", *columns, *(kept[0] if kept else ())]))
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(path)

    @property
    def name(self) -> str:
        """Lightning's name for this logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Lightning asks for one; a run has one file."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings are in every checkpoint."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row; a column that ``metrics`` lacks stays empty."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow({"step": step, **metrics})


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics file; none where there is no file."""
    if not path.exists():
        return []
    # A process that was killed while it wrote leaves a last row cut off, a power cut no text at all.
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        return [row for row in rows if (row.get("step") or "").isdigit() and None not in row.values()]


def make_loggers(config: RunConfig, columns: Sequence[str], start_step: int) -> list[Logger]:
    """Return the loggers that the settings ask for.

    Raises:
        ConfigError: TensorBoard is asked for but not installed, or Weights & Biases cannot be reached.
        CheckpointError: the note of the run at Weights & Biases is damaged, or cannot be written.
    """
    out_dir = config.trainer.run_folder
    loggers: list[Logger] = [MetricsFile(out_dir / METRICS_FILE, columns, start_step)]
    if config.trainer.tensorboard:
        require_tensorboard()
        loggers.append(TensorBoardLogger(save_dir=out_dir, name="tensorboard", version=""))
    if config.trainer.wandb_project is not None:
        loggers.append(_make_wandb_logger(config.trainer.wandb_project, config, out_dir))
    return loggers


def log_answers(loggers: Iterable[Logger], answers: Sequence[Answer], step: int) -> None:
    """Give TensorBoard and Weights & Biases what the model answered, as a table."""
    if not answers:
        return
    for run_logger in loggers:
        if isinstance(run_logger, WandbLogger):
            rows: list[Any] = [[step, *answer] for answer in answers]  # a number is as good as a text
            run_logger.log_text("answers", columns=["step", *Answer._fields], data=rows, step=step)
        elif isinstance(run_logger, TensorBoardLogger):
            lines = [" | ".join(Answer._fields), "--- | ---"]
            lines += [" | ".join(map(_in_a_cell, answer)) for answer in answers]
            run_logger.experiment.add_text("answers", "\n".join(lines), step)


def _in_a_cell(text: str) -> str:
    """Write a text such that it stays in one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "<br>")


def require_tensorboard() -> None:
    """Refuse at once where TensorBoard is not installed.

    Raises:
        ConfigError: it is not; with the command that installs it.
    """
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "trainer.tensorboard is true but TensorBoard is not installed; pip install 'rwkv-train[tensorboard]'"
        )


class _WandbRun(WandbLogger):
    """Lightning's, which leaves a run open: the next one of the same process would go on writing to it.

    It logs the step as a metric and makes it the x-axis, so rows of steps that are done again are not refused.
    """

    def finalize(self, status: str) -> None:
        """End the run, as one that can go on."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def _make_wandb_logger(project: str, config: RunConfig, out_dir: Path) -> WandbLogger:
    from wandb.errors import Error  # noqa: PLC0415 - half a second that only its users pay

    run_logger = _WandbRun(
        project=project,
        name=out_dir.name,
        save_dir=out_dir,
        id=_wandb_id(out_dir, project),
        resume="allow",
        config=to_tree(config),
        allow_val_change=True,  # what a run may change when it goes on is decided there
    )
    try:
        _ = run_logger.experiment  # connects now, not at the first row
    except Error as error:
        raise ConfigError(
            f"trainer.wandb_project is {project!r} but Weights & Biases cannot be used ({error}); run `wandb login`, "
            "set WANDB_MODE=offline, or set it to null"
        ) from error
    return run_logger


def _wandb_id(out_dir: Path, project: str) -> str:
    """Return the id of a run at Weights & Biases, the same whenever it goes on in ``out_dir``.

    A run that goes on in another folder is another one there too, and so is one in another project.

    Raises:
        CheckpointError: the note of the id is damaged, or cannot be written.
    """
    path = out_dir / WANDB_FILE
    if path.exists():
        note = read_json(path)
        if not isinstance(note.get("id"), str):
            raise CheckpointError(f"{path} does not hold the id of a run; remove it to begin a new one there")
        if note.get("project") == project:
            return str(note["id"])
    new_id = secrets.token_hex(4)
    with new_file(path, n_bytes=0) as new:
        write_json(new, {"project": project, "id": new_id})
    return new_id
