"""``rwkv-train chat``: talk to a model."""

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.commands.generate import (
    FrequencyPenalty,
    PenaltyDecay,
    PresencePenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from rwkv_train.commands.inference import (
    AdapterPath,
    Checkpoint,
    Device,
    Dtype,
    DtypeName,
    State,
    TokenizerName,
    load_for_inference,
)
from rwkv_train.errors import ConfigError, RwkvTrainError

if TYPE_CHECKING:
    from rwkv_train.generation.chat import ChatSession

MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Load = Annotated[Path | None, typer.Option(metavar="FILE", help="Go on with a saved conversation.")]

HELP = """\
/reset       forget the conversation
/save FILE   save the conversation's state
/load FILE   go on with a saved conversation
/help        this list
/quit        leave (Ctrl-D too); Ctrl-C interrupts an answer"""


def chat(
    checkpoint: Checkpoint,
    tokenizer: TokenizerName = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.5,
    top_k: TopK = None,
    presence_penalty: PresencePenalty = 0.5,
    frequency_penalty: FrequencyPenalty = 0.5,
    penalty_decay: PenaltyDecay = 0.996,
    seed: Seed = 0,
    stop: Stop = None,
    load: Load = None,
    state: State = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.FP32,
    adapter: AdapterPath = None,
) -> None:
    """Talk to a model. Its memory is the state, so a conversation can go on for ever at the same speed."""
    from rwkv_train.generation.chat import CHAT_STOP, ChatSession
    from rwkv_train.generation.sampling import SamplingSettings

    if sys.stdin is None:
        raise ConfigError(
            "chat reads from the standard input, which is closed; start it from a terminal or a pipe"
        )
    settings = SamplingSettings(temperature, top_p, top_k, presence_penalty, frequency_penalty, penalty_decay)
    model, text_tokenizer = load_for_inference(
        checkpoint, tokenizer, device, dtype, adapter=adapter, state=state
    )
    session = ChatSession(
        model, text_tokenizer, settings, max_tokens=max_tokens, seed=seed, stop=stop or CHAT_STOP
    )
    if load is not None:
        session.load(load)
    typer.echo("/help lists the commands", err=True)
    _talk(session)


def _talk(session: "ChatSession") -> None:
    """Read lines and answer them until the user leaves."""
    while True:
        try:
            line = input("User: ").strip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D or /quit leaves)", err=True)
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                _obey(session, line)
            elif line:
                _answer(session, line)
        except RwkvTrainError as error:  # a wrong file name must not end a conversation
            typer.echo(f"error: {error}", err=True)


def _answer(session: "ChatSession", message: str) -> None:
    typer.echo("\nAssistant:", nl=False)
    try:
        with closing(session.reply(message)) as pieces:
            for piece in pieces:
                typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        typer.echo(" (interrupted)", nl=False, err=True)
    typer.echo("\n")


def _obey(session: "ChatSession", line: str) -> None:
    name, _, argument = line.partition(" ")
    without_file: dict[str, Callable[[], None]] = {"/reset": session.reset, "/help": lambda: typer.echo(HELP)}
    with_file: dict[str, Callable[[Path], None]] = {"/save": session.save, "/load": session.load}
    if name in without_file and not argument:
        without_file[name]()
    elif name in with_file and argument.strip():
        with_file[name](Path(argument.strip()).expanduser())
    else:
        raise ConfigError(f"'{line}' is no command; /help lists them")
