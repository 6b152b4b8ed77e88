import inspect
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from rwkv_train.checkpoints import load_model, write_weights
from rwkv_train.commands.eval_ppl import eval_ppl
from rwkv_train.config.data import DataConfig
from rwkv_train.errors import BackendError, CheckpointError, ConfigError, DataError
from rwkv_train.evaluation import scoring
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.tokenizers import load_tokenizer

app = typer.Typer()
app.command()(eval_ppl)


def run(*arguments):
    return CliRunner().invoke(app, ["--device", "cpu", *map(str, arguments)], env={"COLUMNS": "40"})


def result_of(folder):
    """The result of the only checkpoint."""
    (result,) = json.loads((folder / "out.json").read_text(encoding="utf-8"))["checkpoints"]
    return result


def error_of(kind, *arguments):
    result = run(*arguments)
    assert isinstance(result.exception, kind), result.exception
    return str(result.exception)


@pytest.fixture
def data(tmp_path):
    """Three documents of two domains in one file, and one in another."""
    records = [("prose", "It was night."), ("code", "x = 1\n"), ("prose", "Grüße! 🦢")]
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": domain}}) for domain, text in records]
    (tmp_path / "valid.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "book.txt").write_text("Once upon a time", encoding="utf-8")
    return ["--data", tmp_path / "valid.jsonl", "--data", tmp_path / "book.txt"]


def test_json_holds_the_whole_result(checkpoint, data, tmp_path):
    result = run("--checkpoint", checkpoint, *data, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))

    (result,) = content.pop("checkpoints")
    assert content == {
        "data": [str(data[1]), str(data[3])],
        "mode": "stateful",
        "window": None,
        "limit": None,
        "dtype": "fp32",
    }
    assert result["checkpoint"] == checkpoint
    assert result["tokenizer"] == load_tokenizer("bytes").identity._asdict()
    assert result["prefix_token"] == 0
    assert result["difference_to_first"] is None
    assert {name: sums["documents"] for name, sums in result["domains"].items()} == {
        "book": 1,
        "code": 1,
        "prose": 2,
    }
    total = result["total"]
    assert total["documents"] == 4
    assert total["words"] == 3 + 4 + 2 + 4  # "x = 1\n" has an empty one at its end
    assert total["bytes"] == total["tokens"] == 13 + 6 + len("Grüße! 🦢".encode()) + 16
    assert total["nats"] == pytest.approx(sum(sums["nats"] for sums in result["domains"].values()))
    assert total["bits_per_byte"] == pytest.approx(total["nats"] / total["bytes"] / math.log(2))
    assert total["byte_ppl"] == pytest.approx(2 ** total["bits_per_byte"])
    low, high = total["bits_per_byte_interval"]
    assert low < total["bits_per_byte"] < high
    assert result["domains"]["code"]["bits_per_byte_interval"] is None  # one document
    assert [curve["min_length"] for curve in result["positions"]] == [1, 2, 4, 8, 16]
    assert [curve["documents"] for curve in result["positions"]] == [4, 4, 4, 3, 1]


def test_nats_are_those_of_the_model(checkpoint, data, tmp_path):
    run("--checkpoint", checkpoint, *data[2:], "--json", tmp_path / "out.json")
    model, _ = load_model(checkpoint)
    tokens = torch.tensor([[0, *load_tokenizer("bytes").encode("Once upon a time")]])
    with torch.no_grad():
        log_p = torch.log_softmax(model(tokens[:, :-1]).logits.double(), dim=2)
    expected = -float(log_p[0].gather(1, tokens[0, 1:, None]).sum())
    assert result_of(tmp_path)["total"]["nats"] == pytest.approx(expected, rel=1e-5)


def rows_of(output):
    """Lines of a table by their first word, cut where two spaces stand."""
    lines = [re.split(r"  +", line.strip()) for line in output.splitlines() if line.strip()]
    rows = {}
    for first, *cells in lines:
        rows.setdefault(first, []).append(cells)
    return rows


def test_tables_have_a_row_for_each_domain_and_the_total_however_narrow(checkpoint, data):
    result = run("--checkpoint", checkpoint, *data)
    assert result.exit_code == 0, result.exception
    assert result.stderr == ""
    rows = rows_of(result.stdout)
    for name in ("book", "code", "prose", "total"):
        counts, rates = rows[name]
        assert len(counts) == 5
        assert len(rates) == 6
    assert rows["code"][0][:4] == ["1", "6", "6", "4"]
    assert rows["code"][1][-1] == "-"  # one document has no interval
    assert "…" not in result.stdout
    assert "tokenizer: bytes; read: stateful; read before a document: token 0" in result.stdout
    assert "in 1 of 4 documents" in result.stdout
    assert [first for first in rows if first[0] in "1359" and len(rows[first][0]) == 1] == [
        "1",
        "3-4",
        "5-8",
        "9-16",
    ]


@pytest.mark.parametrize(
    "options", [["--batch-size", 1, "--chunk-len", 1], ["--batch-size", 3, "--chunk-len", 7]]
)
def test_batch_and_chunk_sizes_change_nothing(checkpoint, data, tmp_path, options):
    nats = []
    for extra in ([], options):
        run("--checkpoint", checkpoint, *data, *extra, "--json", tmp_path / "out.json")
        nats.append(result_of(tmp_path)["total"]["nats"])
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)


def test_limit_scores_the_first_documents(checkpoint, data, tmp_path):
    run("--checkpoint", checkpoint, *data, "--limit", 2, "--json", tmp_path / "out.json")
    assert set(result_of(tmp_path)["domains"]) == {"prose", "code"}
    assert result_of(tmp_path)["total"]["bytes"] == 13 + 6
    assert json.loads((tmp_path / "out.json").read_text())["limit"] == 2
    assert "--limit is 0" in error_of(ConfigError, "--checkpoint", checkpoint, *data, "--limit", 0)


def test_builtin_is_the_validation_text_of_the_cache(checkpoint, tmp_path, monkeypatch):
    asked = []

    def write(folder):
        asked.append(folder)
        (tmp_path / "valid.jsonl").write_text('{"text": "abc"}\n')
        return {"train": Path("not/this"), "valid": tmp_path / "valid.jsonl"}

    monkeypatch.setattr("rwkv_train.data.builtin.write_builtin_corpus", write)
    cache = ["--cache-dir", tmp_path / "cache"]
    result = run("--checkpoint", checkpoint, "--data", "builtin", *cache, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    assert asked[0].is_relative_to(tmp_path / "cache")
    assert result_of(tmp_path)["total"]["bytes"] == 3


def test_the_defaults_are_those_of_the_settings_and_the_library():
    options = inspect.signature(eval_ppl).parameters
    assert options["cache_dir"].default == Path(DataConfig().cache_dir)
    assert options["batch_size"].default == scoring.BATCH_SIZE
    assert options["chunk_len"].default == scoring.CHUNK_LEN


def test_data_that_cannot_be_scored_is_refused(checkpoint, tmp_path):
    rest = ["--checkpoint", checkpoint, "--data"]
    assert "No such file" in error_of(DataError, *rest, tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert "is empty" in error_of(DataError, *rest, tmp_path / "empty.jsonl")
    (tmp_path / "hollow.jsonl").write_text('{"text": ""}\n')
    assert "no document with text" in error_of(DataError, *rest, tmp_path / "hollow.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"Gr\xfc\xdfe")
    assert "not UTF-8" in error_of(DataError, *rest, tmp_path / "latin.txt")


def test_a_result_that_cannot_be_written_is_refused_before_the_work(checkpoint, data, tmp_path):
    for target in (tmp_path / "missing" / "out.json", tmp_path):
        message = error_of(ConfigError, "--checkpoint", checkpoint, *data, "--json", target)
        assert "cannot be written" in message


def test_another_tokenizer_than_the_models_is_refused(weights, checkpoint, data, tmp_path):
    message = error_of(DataError, "--checkpoint", checkpoint, *data, "--tokenizer", "world")
    assert "is not the one the model was trained with" in message
    file = write_weights(tmp_path / "model.pth", weights, "pth")
    message = error_of(DataError, "--checkpoint", file, *data, "--tokenizer", "world")
    assert "more than the model's 257" in message


def test_a_model_of_damaged_weights_gives_no_number(weights, data, tmp_path):
    tensors = dict(weights.tensors)
    tensors["ln_out.bias"] = torch.full_like(tensors["ln_out.bias"], math.nan)
    folder = write_weights(tmp_path / "nan", weights._replace(tensors=tensors), "safetensors")
    result = run("--checkpoint", folder, *data, "--json", tmp_path / "out.json")
    assert "is nan, not finite" in str(result.exception)
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def other(weights, tmp_path):
    """Another model of the same tokenizer: its head is zero, so each token costs log2(257) bits."""
    tensors = dict(weights.tensors)
    tensors["head.weight"] = torch.zeros_like(tensors["head.weight"])
    return str(write_weights(tmp_path / "other", weights._replace(tensors=tensors), "safetensors"))


def test_several_checkpoints_are_compared_with_the_first(checkpoint, other, data, tmp_path):
    result = run("--checkpoint", checkpoint, "--checkpoint", other, *data, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    first, second = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["checkpoints"]

    assert second["total"]["bits_per_byte"] == pytest.approx(math.log2(257))
    difference = second["difference_to_first"]["total"]["bits_per_byte"]
    assert difference["value"] == pytest.approx(math.log2(257) - first["total"]["bits_per_byte"])
    # The other's loss is the same everywhere, so the interval of the difference is that of the first, turned round.
    low, high = first["total"]["bits_per_byte_interval"]
    assert difference["interval"] == pytest.approx([math.log2(257) - high, math.log2(257) - low])
    assert second["difference_to_first"]["domains"]["code"]["loss"]["interval"] is None

    lines = [line.split() for line in result.stdout.splitlines()]
    assert f"[1] {checkpoint} (tokenizer: bytes; read before a document: token 0)" in result.stdout
    assert ["[2]", *_shown(second, difference)] in lines
    assert max(map(len, result.stdout.splitlines()[3:])) <= 100


@pytest.fixture
def two_pth(weights, tmp_path):
    """Files that name no tokenizer, of 257 and of 65,536 tokens; with heads of zero every token is as likely."""
    files = []
    for name, vocab_size in (("bytes", 257), ("world", 65_536)):
        config = weights.config.model_copy(update={"vocab_size": vocab_size})
        model = build_model(config, wkv_backend="reference")
        initialize(model, seed=1)
        tensors = model.state_dict()
        tensors["head.weight"] = torch.zeros_like(tensors["head.weight"])
        own = weights._replace(config=config, tensors=tensors, tokenizer=None)
        files.append(write_weights(tmp_path / f"{name}.pth", own, "pth"))
    return files


def test_files_that_name_no_tokenizer_are_compared_each_with_its_own(two_pth, data, tmp_path):
    one, two = (["--checkpoint", file, "--tokenizer", file.stem] for file in two_pth)
    result = run(*one, *two, *data, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    first, second = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["checkpoints"]

    assert [each["tokenizer"]["name"] for each in (first, second)] == ["bytes", "world"]
    texts = ["It was night.", "x = 1\n", "Grüße! 🦢", "Once upon a time"]
    n_tokens = sum(len(load_tokenizer("world").encode(text)) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert first["total"]["bits_per_byte"] == pytest.approx(math.log2(257))
    assert second["total"]["bits_per_byte"] == pytest.approx(16 * n_tokens / n_bytes)
    compared = second["difference_to_first"]["total"]
    assert compared["bits_per_byte"]["value"] == pytest.approx(16 * n_tokens / n_bytes - math.log2(257))
    assert compared["loss"] is None
    assert "The tokenizers differ" in result.stdout


def test_one_tokenizer_is_for_all_files_and_another_number_is_refused(two_pth, data, tmp_path):
    same = ["--checkpoint", two_pth[0]] * 3
    result = run(*same, *data, "--tokenizer", "bytes", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    message = error_of(ConfigError, *same, *data, "--tokenizer", "bytes", "--tokenizer", "world")
    assert "--tokenizer is given 2 times for 3 checkpoints" in message


def _shown(result, difference):
    total = result["total"]
    signed = [difference["value"], *difference["interval"]]
    return [
        f"{total['loss']:.4f}",
        f"{total['token_ppl']:.2f}",
        *(f"{x:.4f}" for x in (total["bits_per_byte"], *total["bits_per_byte_interval"])),
        *(f"{x:+.4f}" for x in signed),
    ]


def test_where_a_later_model_fails_those_before_it_are_reported(weights, checkpoint, other, data, tmp_path):
    tensors = dict(weights.tensors)
    tensors["ln_out.bias"] = torch.full_like(tensors["ln_out.bias"], math.nan)
    damaged = write_weights(tmp_path / "nan", weights._replace(tensors=tensors), "safetensors")
    names = [checkpoint, other, damaged, checkpoint]
    options = [option for name in names for option in ("--checkpoint", name)]
    result = run(*options, *data, "--json", tmp_path / "out.json")
    assert isinstance(result.exception, CheckpointError)
    assert "is nan, not finite" in str(result.exception)
    assert f"[3] {damaged} could not be scored" in result.stderr
    assert "[2]" in rows_of(result.stdout)
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["checkpoints"]
    assert [each["checkpoint"] for each in written] == [checkpoint, other]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_tables_are_printed_though_no_file_can_be_written(checkpoint, data, tmp_path):
    for name in ("/dev/full", tmp_path / ("n" * 250)):
        result = run("--checkpoint", checkpoint, *data, "--json", name, "--plot", tmp_path / "curve.svg")
        assert isinstance(result.exception, CheckpointError), result.exception
        assert str(name) in str(result.exception)
        assert len(rows_of(result.stdout)["total"]) == 2
        assert (tmp_path / "curve.svg").exists()


def test_a_name_that_is_not_utf_8_is_written_as_json_writes_it(checkpoint, tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.txt")
    file.write_text("abc")
    result = run("--checkpoint", checkpoint, "--data", file, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert content["data"] == [str(file)]


def test_two_processes_find_what_one_finds(checkpoint, data, tmp_path):
    results = []
    for devices in (1, 2):
        result = run("--checkpoint", checkpoint, *data, "--devices", devices, "--json", tmp_path / "out.json")
        assert result.exit_code == 0, result.exception
        results.append(result_of(tmp_path))
    one, two = results
    assert list(two["domains"]) == list(one["domains"])
    for a, b in [
        (one["total"], two["total"]),
        *((one["domains"][d], two["domains"][d]) for d in one["domains"]),
    ]:
        expected = {name: pytest.approx(a[name], rel=1e-6) for name in ("nats", "loss", "bits_per_byte")}
        expected |= {name: a[name] for name in ("documents", "tokens", "bytes", "words")}
        assert {name: b[name] for name in expected} == expected
    ends = "bits_per_byte_interval"
    assert two["total"][ends] == pytest.approx(one["total"][ends], rel=1e-6)
    assert two["domains"]["prose"][ends] == pytest.approx(one["domains"]["prose"][ends], rel=1e-6)
    assert [curve["documents"] for curve in two["positions"]] == [
        curve["documents"] for curve in one["positions"]
    ]


def test_what_is_wrong_in_a_process_is_said_as_by_one_alone(checkpoint, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    message = error_of(
        DataError, "--checkpoint", checkpoint, "--data", tmp_path / "bad.jsonl", "--devices", 2
    )
    assert "bad.jsonl, line 2" in message


def test_bad_lines_are_passed_over_where_asked_for(checkpoint, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "abc"}\nno JSON\n{"text": "de"}\n')
    rest = ["--checkpoint", checkpoint, "--data", tmp_path / "bad.jsonl"]
    assert "bad.jsonl, line 2" in error_of(DataError, *rest)
    assert run(*rest, "--skip-bad-lines", "--json", tmp_path / "out.json").exit_code == 0
    assert result_of(tmp_path)["total"]["bytes"] == 5


def test_columns_and_format_are_those_named(checkpoint, tmp_path):
    (tmp_path / "rows.data").write_text("body,kind\nabc,x\nde,y\n")
    options = ["--data-format", "csv", "--text-column", "body", "--domain-column", "kind"]
    result = run(
        "--checkpoint",
        checkpoint,
        "--data",
        tmp_path / "rows.data",
        *options,
        "--json",
        tmp_path / "out.json",
    )
    assert result.exit_code == 0, result.exception
    assert {name: sums["bytes"] for name, sums in result_of(tmp_path)["domains"].items()} == {"x": 3, "y": 2}


def test_windows_and_streams_know_less_and_more(checkpoint, data, tmp_path):
    nats = {}
    for name, options in {
        "whole": [],
        "long": ["--mode", "windowed", "--window", 1000],
        "short": ["--mode", "windowed", "--window", 2],
        "stream": ["--mode", "stream"],
    }.items():
        assert (
            run("--checkpoint", checkpoint, *data, *options, "--json", tmp_path / "out.json").exit_code == 0
        )
        nats[name] = result_of(tmp_path)["total"]["nats"]
    assert nats["long"] == pytest.approx(nats["whole"], rel=1e-6)
    assert len({round(value, 3) for value in nats.values()}) == 3


def test_without_a_prefix_the_report_says_what_is_not_scored(checkpoint, data, tmp_path):
    result = run("--checkpoint", checkpoint, *data, "--prefix-token", "none", "--json", tmp_path / "out.json")
    assert "no prefix, so the first token of each document is not scored" in result.stdout
    total = result_of(tmp_path)["total"]
    assert total["tokens"] == total["bytes"] - 4
    assert result_of(tmp_path)["prefix_token"] is None


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (["--mode", "windowed"], ConfigError, "--mode windowed needs --window N"),
        (["--window", 8], ConfigError, "--window 8 has a meaning with --mode windowed only"),
        (["--mode", "stream", "--devices", 2], ConfigError, "--devices 2 has nothing to share"),
        (["--mode", "stream", "--prefix-token", "none"], ConfigError, "needs a token between documents"),
        (
            ["--prefix-token", "eos"],
            ConfigError,
            "--prefix-token is 'eos'; wanted the id of a token, or none",
        ),
        (["--prefix-token", 257], ConfigError, "--prefix-token is 257; the model's tokens are 0 to 256"),
        (["--devices", 0], ConfigError, "--devices is 0; it must be at least 1"),
        (["--chunk-len", 0], ConfigError, "--chunk-len is 0; it must be at least 1"),
        (["--min-length", 3], ConfigError, "--min-length is 3; it must be a power of two"),
        (["--min-length", 1024], ConfigError, "no document has so many tokens"),
        (["--min-length", 2**60], ConfigError, "--min-length is 1152921504606846976; it must be at most"),
        (["--device", "meta"], BackendError, "--device meta has no numbers to compute with"),
        (["--plot", "curve.pdf"], ConfigError, "must end in .png or .svg"),
        (["--plot", "missing/curve.png"], ConfigError, "--plot missing/curve.png cannot be written"),
        (["--data-format", "xml"], DataError, "there is no format 'xml'"),
    ],
)
def test_options_that_make_no_sense_are_refused(checkpoint, data, options, kind, message):
    assert message in error_of(kind, "--checkpoint", checkpoint, *data, *options)


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_curve_is_drawn_as_the_ending_says(checkpoint, other, data, tmp_path, ending, start):
    picture = tmp_path / f"curve.{ending}"
    both = ["--checkpoint", checkpoint, "--checkpoint", other]
    result = run(*both, *data, "--limit", 2, "--plot", picture, "--min-length", 4)
    assert result.exit_code == 0, result.exception
    assert picture.read_bytes().startswith(start)
    assert "in 2 of 2 documents" in result.stdout


def test_a_curve_that_cannot_be_had_loses_no_result(checkpoint, data, tmp_path):
    result = run("--checkpoint", checkpoint, *data, "--min-length", 1024, "--json", tmp_path / "out.json")
    assert "no document has so many tokens" in str(result.exception)
    assert result_of(tmp_path)["total"]["documents"] == 4
    assert len(rows_of(result.stdout)["total"]) == 2


def test_a_further_checkpoint_that_cannot_be_read_is_refused_before_the_first_is_scored(
    weights, checkpoint, data, tmp_path, monkeypatch
):
    monkeypatch.setattr("rwkv_train.evaluation.sharing.evaluate_checkpoint", None)
    both = ["--checkpoint", checkpoint, "--checkpoint"]
    assert "no such file" in error_of(CheckpointError, *both, tmp_path / "missing", *data)
    file = write_weights(tmp_path / "model.pth", weights, "pth")
    assert "name it with --tokenizer" in error_of(DataError, *both, file, *data)


def test_a_long_name_of_a_domain_leaves_the_table_its_width(checkpoint, tmp_path):
    name = "a\x1b[31m" + "b" * 100 + "end"
    record = {"text": "abc", "meta": {"pile_set_name": name}}
    (tmp_path / "long.jsonl").write_text(json.dumps(record))
    both = ["--checkpoint", checkpoint, "--checkpoint", checkpoint]
    arguments = ["--data", tmp_path / "long.jsonl", "--json", tmp_path / "out.json"]
    for result in (run(*both[:2], *arguments), run(*both, *arguments)):
        assert result.exit_code == 0, result.exception
        lines = [line for line in result.stdout.splitlines() if not line.startswith("[")]
        assert max(map(len, lines)) <= 120
        assert "\x1b" not in result.stdout
        assert "bend" in result.stdout
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert list(content["checkpoints"][0]["domains"]) == [name]


def test_of_many_domains_the_largest_are_shown_and_all_written(checkpoint, tmp_path):
    sizes = {f"d{number:02}": 2 if number % 2 else 3 for number in range(78)} | {"large": 50, "small": 1}
    lines = [json.dumps({"text": "x" * n, "meta": {"pile_set_name": name}}) for name, n in sizes.items()]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    arguments = ["--data", tmp_path / "many.jsonl", "--json", tmp_path / "out.json"]
    for n_models in (1, 2):
        result = run(*["--checkpoint", checkpoint] * n_models, *arguments)
        assert result.exit_code == 0, result.exception
        shown = {name for name in rows_of(result.stdout) if name in sizes}
        assert shown == {name for name, n in sizes.items() if n >= 3}
        assert len(shown) == 40
        assert (
            "\ndomains beyond the 40 largest: 40; they are in the total, and --json has all" in result.stdout
        )
        assert "80 documents" in result.stdout or rows_of(result.stdout)["total"][0][0] == "80"
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert content["checkpoints"][0]["domains"].keys() == sizes.keys()


def test_a_long_path_leaves_the_picture_its_room(checkpoint, data, tmp_path):
    folder = tmp_path / "_$x" / ("very" * 30) / "$y"
    shutil.copytree(checkpoint, folder)
    picture = tmp_path / "curve.svg"
    result = run("--checkpoint", folder, *data, "--plot", picture)
    assert result.exit_code == 0, result.exception
    (width,) = re.findall(r'<clipPath.*?<rect [^>]*width="([\d.]+)"', picture.read_text(), re.DOTALL)
    assert float(width) > 400  # of the 504 points that the picture has
