import pytest
import typer
from typer.testing import CliRunner

from rwkv_train.commands.chat import chat
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.generation.chat import ChatSession

app = typer.Typer()
app.command()(chat)


@pytest.fixture
def talk(checkpoint):
    """Type lines into a chat; gives what it printed on stdout and stderr."""

    def run(*lines, options=()):
        arguments = ["--checkpoint", checkpoint, "--device", "cpu", "--max-tokens", "8", *map(str, options)]
        result = CliRunner().invoke(app, arguments, input="".join(f"{line}\n" for line in lines))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0
        return result.stdout, result.stderr

    return run


def test_the_same_conversation_is_had_again(talk):
    first, _ = talk("Hello", "More")
    assert first == talk("Hello", "More")[0]
    assert first.count("Assistant:") == 2


def test_end_of_input_and_quit_leave(talk):
    assert talk("/quit", "Hello")[0].count("Assistant:") == 0
    assert talk()[0] == "User: \n"


def test_empty_lines_are_not_answered(talk):
    assert "Assistant:" not in talk("", "   ")[0]


def test_reset_forgets(talk):
    answers = talk("Hello", "/reset", "Hello")[0].split("Assistant:")
    assert answers[1].replace("User: ", "") == answers[2].replace("User: ", "")


def test_a_conversation_is_saved_and_goes_on(talk, tmp_path):
    file = tmp_path / "my talk.safetensors"
    whole, _ = talk("Hello", f"/save {file}", "Still there?")
    by_command, _ = talk(f"/load {file}", "Still there?")
    by_option, _ = talk("Still there?", options=["--load", file])
    answer = whole.split("Assistant:")[-1]
    assert by_command.split("Assistant:")[-1] == answer
    assert by_option.split("Assistant:")[-1] == answer


def test_a_wrong_command_or_file_does_not_end_the_conversation(talk, tmp_path):
    out, err = talk("/sav", "/save", "/reset now", "/save x", f"/load {tmp_path / 'no'}", "Hello")
    assert out.count("Assistant:") == 1
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: '/sav' is no command; /help lists them"
    assert errors[1] == "error: '/save' is no command; /help lists them"
    assert errors[2] == "error: '/reset now' is no command; /help lists them"
    assert errors[3] == "error: there is no conversation to save yet"
    assert "no: the state cannot be read" in errors[4]
    assert len(errors) == 5


def test_help_lists_every_command(talk):
    out, _ = talk("/help")
    assert all(name in out for name in ["/reset", "/save FILE", "/load FILE", "/quit", "/help"])


def test_a_conversation_to_load_that_is_not_there_is_refused_at_the_start(talk, tmp_path):
    with pytest.raises(CheckpointError, match="the state cannot be read"):
        talk("Hello", options=["--load", tmp_path / "no"])


def test_an_interrupted_answer_leads_back_to_the_prompt(talk, monkeypatch):
    original = ChatSession.reply

    def interrupted(session, message):
        if message == "Hello":
            yield " partly"
            raise KeyboardInterrupt
        yield from original(session, message)

    monkeypatch.setattr(ChatSession, "reply", interrupted)
    out, err = talk("Hello", "And now?")
    assert "Assistant: partly\n" in out
    assert out.count("Assistant:") == 2
    assert "(interrupted)" in err


def test_a_closed_input_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match="standard input, which is closed"):
        chat(checkpoint)
