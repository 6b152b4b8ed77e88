"""``rwkv-train generate``: continue a text."""

import sys
from pathlib import Path
from typing import Annotated

import typer

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
from rwkv_train.errors import ConfigError, DataError

Prompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="The text to continue; without it and --prompt-file, stdin."),
]
PromptFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A UTF-8 file with the text to continue.")
]
MaxTokens = Annotated[int, typer.Option(help="End after this many tokens at the latest.")]
Temperature = Annotated[
    float, typer.Option(help="Below 1 more careful, above 1 more varied, 0 always the best token.")
]
TopP = Annotated[
    float,
    typer.Option(
        help="Choose among the fewest best tokens whose probabilities sum to this at least; 1: all."
    ),
]
TopK = Annotated[int | None, typer.Option(help="Choose among this many best tokens.")]
PresencePenalty = Annotated[
    float, typer.Option(help="Taken from the logits of tokens that were already generated.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="The same for each time that a token was generated, decaying.")
]
PenaltyDecay = Annotated[
    float, typer.Option(help="Each token multiplies the counts of earlier ones by this.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help=r"End before this text; may be repeated. A new line is $'\n' in bash."),
]


def generate(
    checkpoint: Checkpoint,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokenizer: TokenizerName = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.9,
    top_k: TopK = None,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    penalty_decay: PenaltyDecay = 0.996,
    seed: Seed = 0,
    stop: Stop = None,
    state: State = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.FP32,
    adapter: AdapterPath = None,
) -> None:
    """Continue a text: what the model writes goes to stdout as it comes."""
    text = _read_prompt(prompt, prompt_file)

    from rwkv_train.generation.generate import generate as generate_text
    from rwkv_train.generation.sampling import SamplingSettings

    settings = SamplingSettings(temperature, top_p, top_k, presence_penalty, frequency_penalty, penalty_decay)
    model, text_tokenizer = load_for_inference(
        checkpoint, tokenizer, device, dtype, adapter=adapter, state=state
    )
    for piece in generate_text(
        model, text_tokenizer, text, settings, max_tokens=max_tokens, seed=seed, stop=stop or ()
    ):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ConfigError("--prompt and --prompt-file are both given; leave one out")
    if prompt is not None:
        return prompt
    if prompt_file is None and sys.stdin.isatty():
        raise ConfigError("there is no text to continue; give --prompt, --prompt-file, or text on stdin")
    source = "stdin" if prompt_file is None else str(prompt_file)
    try:
        return (sys.stdin.buffer.read() if prompt_file is None else prompt_file.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}") from error
