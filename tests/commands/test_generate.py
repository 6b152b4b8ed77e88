import inspect

import typer
from typer.testing import CliRunner

from rwkv_train.checkpoints import load_model, write_weights
from rwkv_train.commands.generate import generate
from rwkv_train.errors import BackendError, ConfigError, DataError
from rwkv_train.generation import generate as library
from rwkv_train.generation.sampling import SamplingSettings
from rwkv_train.tokenizers import TokenizerIdentity, load_tokenizer

app = typer.Typer()
app.command()(generate)


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"], input=stdin)


def text_of(*arguments, stdin=None):
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.exception
    assert result.stderr == ""
    return result.stdout


def error_of(kind, *arguments, stdin=None):
    result = run(*arguments, stdin=stdin)
    assert isinstance(result.exception, kind), result.exception
    return str(result.exception)


def test_it_prints_what_the_library_generates(checkpoint):
    model, _ = load_model(checkpoint)
    settings = SamplingSettings(
        temperature=0.8, top_p=0.7, top_k=20, presence_penalty=0.3, frequency_penalty=0.2
    )
    pieces = library.generate(
        model, load_tokenizer("bytes"), "To be", settings, max_tokens=40, seed=7, stop=["q"]
    )
    options = ["--temperature", 0.8, "--top-p", 0.7, "--top-k", 20, "--presence-penalty", 0.3]
    options += ["--frequency-penalty", 0.2, "--max-tokens", 40, "--seed", 7, "--stop", "q"]
    assert text_of("--checkpoint", checkpoint, "--prompt", "To be", *options) == "".join(pieces) + "\n"


def test_a_prompt_comes_from_the_command_a_file_or_stdin(checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("Grüße\n", encoding="utf-8")
    rest = ["--checkpoint", checkpoint, "--max-tokens", 20]
    texts = {
        text_of("--prompt", "Grüße\n", *rest),
        text_of("--prompt-file", tmp_path / "prompt.txt", *rest),
        text_of(*rest, stdin="Grüße\n"),
    }
    assert len(texts) == 1


def test_the_seed_decides_the_text(checkpoint):
    rest = ["--checkpoint", checkpoint, "--prompt", "a", "--max-tokens", 20]
    assert text_of("--seed", 1, *rest) == text_of("--seed", 1, *rest) != text_of("--seed", 2, *rest)


def test_two_prompts_are_refused(checkpoint, tmp_path):
    message = error_of(ConfigError, "--checkpoint", checkpoint, "--prompt", "a", "--prompt-file", tmp_path)
    assert "leave one out" in message


def test_a_prompt_that_is_not_utf8_is_refused(checkpoint, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"Gr\xfc\xdfe")
    message = error_of(DataError, "--checkpoint", checkpoint, "--prompt-file", tmp_path / "latin.txt")
    assert message.endswith("latin.txt is not UTF-8: byte 2 is 0xfc")
    assert "stdin is not UTF-8" in error_of(DataError, "--checkpoint", checkpoint, stdin=b"\xff")


def test_a_missing_prompt_file_is_refused(checkpoint, tmp_path):
    message = error_of(DataError, "--checkpoint", checkpoint, "--prompt-file", tmp_path / "no.txt")
    assert "no.txt cannot be read: No such file" in message


def test_a_setting_outside_its_range_is_refused(checkpoint):
    message = error_of(ConfigError, "--checkpoint", checkpoint, "--prompt", "a", "--top-p", 2)
    assert message == "top_p is 2.0; it must be a number from 0 to 1"


def test_a_device_that_is_not_there_is_refused(checkpoint):
    result = CliRunner().invoke(app, ["--checkpoint", checkpoint, "--prompt", "a", "--device", "cuda:77"])
    assert isinstance(result.exception, BackendError)
    assert "there is no device 'cuda:77' here" in str(result.exception)


def test_a_checkpoint_that_names_no_tokenizer_needs_one_named(weights, tmp_path):
    file = write_weights(tmp_path / "model.pth", weights, "pth")
    rest = ["--checkpoint", file, "--prompt", "a", "--max-tokens", 5]
    assert "name it with --tokenizer" in error_of(DataError, *rest)
    assert text_of(*rest, "--tokenizer", "bytes")


def test_another_tokenizer_than_the_checkpoints_is_refused(weights, checkpoint, tmp_path):
    message = error_of(DataError, "--checkpoint", checkpoint, "--prompt", "a", "--tokenizer", "world")
    assert "the tokenizer 'world'" in message
    assert "is not the one the model was trained with: 'bytes'" in message

    changed = weights._replace(tokenizer=TokenizerIdentity("bytes", "0" * 64))
    folder = write_weights(tmp_path / "changed", changed, "safetensors")
    assert "sha256 0000000000000000" in error_of(DataError, "--checkpoint", folder, "--prompt", "a")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(weights, tmp_path):
    file = write_weights(tmp_path / "model.pth", weights, "pth")
    message = error_of(DataError, "--checkpoint", file, "--prompt", "a", "--tokenizer", "world")
    assert "has 65530 tokens, more than the model's 257" in message


def test_the_defaults_are_those_of_the_library():
    options = inspect.signature(generate).parameters
    assert {field: options[field].default for field in vars(SamplingSettings())} == vars(SamplingSettings())
