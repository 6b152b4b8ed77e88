"""What a person sees while a run goes on: a progress bar on a terminal, lines in a log elsewhere."""

import functools
import logging
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from rwkv_train.training.meter import StepMetrics

logger = logging.getLogger(__name__)


@functools.cache
def stderr_console() -> Console:
    """Return the one console of stderr, so that log lines and the bar do not write over each other."""
    return Console(stderr=True)


class Display:
    """Progress of a run on stderr.

    Args:
        n_steps: steps of the whole run.
        start_step: steps that are done already.
        is_shown: whether this process is the one that reports.
    """

    def __init__(self, n_steps: int, start_step: int, *, is_shown: bool) -> None:
        self._n_steps = n_steps
        self._bar: Progress | None = None
        if is_shown and sys.stderr is not None and sys.stderr.isatty():
            self._bar = Progress(
                # On a narrow terminal the metrics give way, not the step and the time left.
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                TimeRemainingColumn(True, True, table_column=Column(no_wrap=True)),
                console=stderr_console(),
                # Time left is estimated from the last minutes, not from the first, slower steps.
                speed_estimate_period=120,
            )
            self._task = self._bar.add_task("train", total=n_steps, completed=start_step, metrics="")

    def open(self) -> None:
        """Show the bar, which hides the cursor until :meth:`close`."""
        if self._bar is not None:
            self._bar.start()

    def advance(self, step: int) -> None:
        """Show that ``step`` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: StepMetrics, learning_rate: float) -> None:
        """Show the metrics of the last steps."""
        numbers = (
            f"loss {metrics.loss:.4f}  lr {learning_rate:.2e}  {metrics.tokens_per_second:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, metrics=numbers)
        # With a bar on the terminal the line goes to the log file only.
        level = logging.INFO if self._bar is None else logging.DEBUG
        logger.log(level, "step %d/%d  %s", step, self._n_steps, numbers)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
