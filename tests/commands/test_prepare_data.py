"""``rwkv-train prepare-data``: what it writes, prints and refuses."""

import json

import pytest
import typer
from typer.testing import CliRunner

from rwkv_train.commands.prepare_data import prepare_data
from rwkv_train.data.stored import load_corpus
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer


@pytest.fixture
def run(monkeypatch):
    app = typer.Typer()
    app.command()(prepare_data)
    monkeypatch.setenv("COLUMNS", "100")  # the table is not to be cut

    def invoke(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    records = [{"text": "hello", "meta": {"pile_set_name": "greetings"}}, {"text": ""}, {"text": "x" * 2000}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_files_become_a_corpus_and_a_table(run, text, tmp_path):
    (tmp_path / "more.txt").write_text("bye")

    result = run(
        "--input",
        text,
        "--input",
        tmp_path / "more.txt",
        "--tokenizer",
        "bytes",
        "--output",
        tmp_path / "out",
    )

    assert result.exit_code == 0, result.output
    assert load_corpus(tmp_path / "out").tokens_by_domain() == {"greetings": 6, "unknown": 2001, "more": 4}
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    assert ["greetings", "1", "6", "5", "1"] in rows
    assert ["unknown", "1", "2,001", "2,000", "1"] in rows
    assert ["total", "3", "2,011", "2,008", "3"] in rows
    assert "skipped, because without text: 1 documents" in result.stdout


def test_names_that_look_like_markup_are_shown_as_they_are(run, tmp_path):
    record = {"text": "hello", "meta": {"pile_set_name": "[/b][red]x"}}
    (tmp_path / "text.jsonl").write_text(json.dumps(record) + "\n")

    result = run("--input", tmp_path / "text.jsonl", "--tokenizer", "bytes", "--output", tmp_path / "[/i]")

    assert result.exit_code == 0, result.exception
    assert "[/b][red]x" in result.stdout


def test_many_domains_are_summed_up(run, tmp_path):
    lines = [json.dumps({"text": "ab", "n": f"domain {number}"}) for number in range(100)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))

    result = run(
        "--input",
        tmp_path / "text.jsonl",
        "--domain-column",
        "n",
        "--tokenizer",
        "bytes",
        "--output",
        tmp_path / "x",
    )

    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    assert ["60", "others", "60", "180", "120", "60"] in rows
    assert ["total", "100", "300", "200", "100"] in rows


def test_progress_goes_to_stderr_where_it_is_a_terminal(run, text, tmp_path, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes it for a terminal
    result = run("--input", text, "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert "tokenizing" in result.stderr
    assert "tokenizing" not in result.stdout

    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    result = run("--input", text, "--tokenizer", "bytes", "--output", tmp_path / "other")
    assert result.stderr == ""


def test_an_existing_output_needs_overwrite(run, text, tmp_path):
    arguments = ("--input", text, "--tokenizer", "bytes", "--output", tmp_path / "out")
    run(*arguments)

    refused = run(*arguments)
    replaced = run(*arguments, "--overwrite")

    assert isinstance(refused.exception, DataError)
    assert "exists already" in str(refused.exception)
    assert replaced.exit_code == 0


def test_the_builtin_corpus_is_text_and_tokens_of_both_parts(run, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_train.data.builtin._modules", lambda root: ())  # the topics will do

    result = run("--input", "builtin", "--tokenizer", "bytes", "--output", tmp_path / "corpus")

    assert result.exit_code == 0, result.output
    for split in ("train", "valid"):
        corpus = load_corpus(tmp_path / f"corpus-{split}")
        corpus.require_tokenizer(load_tokenizer("bytes").identity)
        assert (tmp_path / f"corpus-{split}.jsonl.zst").is_file()
        assert f"{corpus.sidecar.n_tokens:,}" in result.stdout


def test_what_is_left_out_is_counted_and_named(run, tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [{"text": f"text {number % 20}", "meta": {"pile_set_name": "a"}} for number in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "oops\n")
    arguments = ("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out", "--workers", 1)

    refused = run(*arguments)
    result = run(*arguments, "--skip-bad-lines", "--dedup", "exact", "--valid-fraction", 0.5, "--shuffle", 1)

    assert isinstance(refused.exception, DataError)
    assert "line 31: not JSON" in str(refused.exception)
    assert result.exit_code == 0, result.output
    assert "cannot be used: 1 records" in result.stdout
    assert "line 31: not JSON" in result.stdout
    assert "because an earlier document is the same: 10 documents (a 10)" in result.stdout
    n_documents = [load_corpus(tmp_path / f"out-{part}").tokens.n_documents for part in ("train", "valid")]
    assert sum(n_documents) == 20
    assert min(n_documents) > 0


@pytest.mark.parametrize("option", [("--valid-fraction", 0.1), ("--workers", 2), ("--skip-bad-lines",)])
def test_an_option_that_the_builtin_corpus_would_ignore_is_refused(run, tmp_path, option):
    result = run("--input", "builtin", "--tokenizer", "bytes", "--output", tmp_path / "out", *option)

    assert isinstance(result.exception, DataError)
    assert "takes no options but --tokenizer, --output and --overwrite" in str(result.exception)


def test_the_builtin_corpus_is_not_mixed_with_files(run, text, tmp_path):
    result = run("--input", "builtin", "--input", text, "--tokenizer", "bytes", "--output", tmp_path / "out")

    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith("--input builtin stands alone")


@pytest.mark.parametrize(
    ("name", "tokenizer", "sentence"),
    [("absent.jsonl", "bytes", "cannot read .*absent"), ("text.jsonl", "wrld", "no tokenizer 'wrld'")],
    ids=["missing file", "unknown tokenizer"],
)
def test_what_cannot_be_used_is_one_of_our_errors(name, tokenizer, sentence, run, text, tmp_path):
    result = run("--input", tmp_path / name, "--tokenizer", tokenizer, "--output", tmp_path / "out")

    with pytest.raises(DataError, match=sentence):
        raise result.exception
    assert not list(tmp_path.glob("*out*"))


def test_tokenizer_and_output_must_be_named(run, text):
    result = run("--input", text)

    assert result.exit_code == 2


def test_the_help_names_the_extra_that_near_duplicates_need(run):
    result = run("--help")

    assert "rwkv-train[dedup]" in result.stdout
    assert "\\[" not in result.stdout


def test_files_without_records_are_counted(run, text, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    text.rename(folder / "a.jsonl")
    (folder / "b.jsonl").touch()

    result = run("--input", folder, "--tokenizer", "bytes", "--output", tmp_path / "out")

    assert "passed over, because without records: 1 files" in result.stdout
