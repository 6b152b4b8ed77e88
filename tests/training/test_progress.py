import io

from rich.console import Console

from rwkv_train.training import progress
from rwkv_train.training.progress import Display

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def terminal_for_stderr(monkeypatch):
    """Return what is written to it; not a fixture, because pytest takes stderr back before a test starts."""
    text = io.StringIO()
    text.isatty = lambda: True
    console = Console(file=text, force_terminal=True, _environ={"TERM": "xterm"})
    monkeypatch.setattr("sys.stderr", text)
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    return text


def test_a_run_that_does_not_start_leaves_the_terminal_alone(monkeypatch):
    terminal = terminal_for_stderr(monkeypatch)
    Display(n_steps=4, start_step=4, is_shown=True)
    assert terminal.getvalue() == ""


def test_a_bar_gives_the_cursor_back(monkeypatch):
    terminal = terminal_for_stderr(monkeypatch)
    display = Display(n_steps=4, start_step=0, is_shown=True)
    display.open()
    assert terminal.getvalue().count(HIDE_CURSOR) == 1
    display.close()
    assert terminal.getvalue().count(SHOW_CURSOR) == 1
