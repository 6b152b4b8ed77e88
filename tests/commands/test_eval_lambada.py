import inspect
import json
import math
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from rwkv_train.checkpoints import load_model
from rwkv_train.commands.eval_lambada import eval_lambada
from rwkv_train.errors import ConfigError, DataError
from rwkv_train.evaluation import scoring
from rwkv_train.tokenizers import load_tokenizer

app = typer.Typer()
app.command()(eval_lambada)

TEXTS = ["once upon a time", "the last word", "state and decay"]


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"], env={"COLUMNS": "40"})


def error_of(kind, *arguments):
    result = run(*arguments)
    assert isinstance(result.exception, kind), result.exception
    return str(result.exception)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "lambada_test.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("prefix", "before"), [("end-of-document", [0]), ("newline", [1 + ord("\n")]), ("none", [])]
)
def test_json_holds_the_numbers_of_the_model_and_how_they_came(checkpoint, data, tmp_path, prefix, before):
    options = ["--prefix", prefix, "--limit", 2, "--json", tmp_path / "out.json"]
    result = run("--checkpoint", checkpoint, "--data", data, *options)
    assert result.exit_code == 0, result.exception

    model, _ = load_model(checkpoint)
    tokenizer = load_tokenizer("bytes")
    nats = 0.0
    for text in TEXTS[:2]:
        context, word = text.rsplit(" ", 1)
        target = tokenizer.encode(" " + word)
        tokens = torch.tensor([before + tokenizer.encode(context) + target])
        with torch.no_grad():
            log_p = torch.log_softmax(model(tokens[:, :-1]).logits.double(), dim=2)[0, -len(target) :]
        nats -= float(log_p.gather(1, torch.tensor(target)[:, None]).sum())

    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert content["ppl"] == pytest.approx(math.exp(nats / 2), rel=1e-4)
    assert content["ppl_interval"][0] < content["ppl"] < content["ppl_interval"][1]
    assert content["accuracy_interval"][0] <= content["accuracy"] <= content["accuracy_interval"][1]
    circumstances = {name: content[name] for name in ("documents", "checkpoint", "prefix", "limit", "dtype")}
    assert circumstances == {
        "documents": 2,
        "checkpoint": checkpoint,
        "prefix": prefix,
        "limit": 2,
        "dtype": "fp32",
    }
    assert content["tokenizer"] == tokenizer.identity._asdict()


def test_the_table_says_perplexity_and_accuracy_with_intervals_and_how_it_was_read(checkpoint, data):
    result = run("--checkpoint", checkpoint, "--data", data)
    assert result.exit_code == 0, result.exception
    assert result.stderr == ""
    assert result.stdout.count(" to ") == 2
    assert "%" in result.stdout
    assert "…" not in result.stdout
    assert "prefix: end-of-document, tokenizer: bytes" in result.stdout


def test_one_passage_has_no_interval_of_its_perplexity(checkpoint, data, tmp_path):
    run("--checkpoint", checkpoint, "--data", data, "--limit", 1, "--json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["ppl_interval"] is None


def test_what_cannot_be_scored_or_written_is_refused(checkpoint, data, tmp_path):
    rest = ["--checkpoint", checkpoint, "--data"]
    (tmp_path / "words.jsonl").write_text('{"text": "two words"}\n{"text": "word"}\n')
    assert "passage 2 of the data has no space" in error_of(DataError, *rest, tmp_path / "words.jsonl")
    assert "missing.jsonl" in error_of(DataError, *rest, tmp_path / "missing.jsonl")
    assert "--limit is 0" in error_of(ConfigError, *rest, data, "--limit", 0)
    missing_folder = tmp_path / "missing" / "out.json"
    assert "cannot be written" in error_of(ConfigError, *rest, data, "--json", missing_folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_the_table_is_printed_though_the_file_cannot_be_written(checkpoint, data):
    result = run("--checkpoint", checkpoint, "--data", data, "--json", "/dev/full")
    assert "/dev/full" in str(result.exception)
    assert "prefix: end-of-document, tokenizer: bytes" in result.stdout


def test_the_defaults_are_those_of_the_library():
    options = inspect.signature(eval_lambada).parameters
    assert options["batch_size"].default == scoring.BATCH_SIZE
    assert options["chunk_len"].default == scoring.CHUNK_LEN
