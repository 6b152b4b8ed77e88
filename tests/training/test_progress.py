import io

import pytest
from rich.console import Console

from rwkv_train.training import progress
from rwkv_train.training.progress import Display

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def terminal(monkeypatch):
    """A terminal for stderr; its text is in ``getvalue()``."""
    text = io.StringIO()
    text.isatty = lambda: True
    console = Console(file=text, force_terminal=True, _environ={"TERM": "xterm"})
    monkeypatch.setattr("sys.stderr", text)
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    return text


def test_a_run_that_does_not_start_leaves_the_terminal_alone(terminal):
    Display(n_steps=4, start_step=4, is_shown=True)
    assert terminal.getvalue() == ""


def test_a_bar_gives_the_cursor_back(terminal):
    display = Display(n_steps=4, start_step=0, is_shown=True)
    display.open()
    assert terminal.getvalue().count(HIDE_CURSOR) == 1
    display.close()
    assert terminal.getvalue().count(SHOW_CURSOR) == 1
