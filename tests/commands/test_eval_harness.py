import functools
import importlib.util
import inspect
import json

import pytest
import typer
from typer.testing import CliRunner

from rwkv_train.commands.eval_harness import eval_harness
from rwkv_train.errors import ConfigError
from rwkv_train.evaluation import scoring

app = typer.Typer()
app.command()(eval_harness)


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])


def error_of(kind, *arguments):
    result = run(*arguments)
    assert isinstance(result.exception, kind), result.exception
    return str(result.exception)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of its own, without the index of the harness' tasks, which takes seconds."""
    from lm_eval.tasks import TaskManager

    from rwkv_train.evaluation import harness_tasks

    monkeypatch.setattr(harness_tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    data = tmp_path / "data.jsonl"
    data.write_text('{"q": "one", "a": 0}\n{"q": "two", "a": 1}\n{"q": "three", "a": 1}\n')
    task = {
        "task": "guess",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}:",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "guess.yaml").write_text(json.dumps(task))
    return folder


def test_a_task_is_run_printed_and_written(checkpoint, tasks, tmp_path):
    options = ["--include-path", tasks, "--num-fewshot", 1, "--limit", 2, "--json", tmp_path / "out.json"]
    result = run("--checkpoint", checkpoint, "--tasks", "guess", *options)
    assert result.exit_code == 0, result.exception
    assert "|guess" in result.stdout

    content = json.loads((tmp_path / "out.json").read_text())
    assert content["results"]["guess"]["acc,none"] in (0, 0.5, 1)
    assert content["n-samples"]["guess"] == {"original": 3, "effective": 2}
    assert content["n-shot"]["guess"] == 1
    assert content["config"]["prefix"] == "end-of-document"
    assert content["checkpoint"] == checkpoint


def test_without_the_extra_it_is_named(checkpoint, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = error_of(ConfigError, "--checkpoint", checkpoint, "--tasks", "x")
    assert "pip install 'rwkv-train[lm-eval]'" in message


def test_what_is_not_there_is_refused(checkpoint, tasks, tmp_path):
    rest = ["--checkpoint", checkpoint, "--include-path", tasks]
    assert "has no task 'gess'; did you mean 'guess'?" in error_of(
        ConfigError, *rest, "--tasks", "guess,gess"
    )
    assert "names no task" in error_of(ConfigError, *rest, "--tasks", " ,")
    assert "cannot be written" in error_of(ConfigError, *rest, "--tasks", "guess", "--json", tmp_path)


def test_the_defaults_are_those_of_the_library():
    options = inspect.signature(eval_harness).parameters
    assert options["batch_size"].default == scoring.BATCH_SIZE
    assert options["chunk_len"].default == scoring.CHUNK_LEN
