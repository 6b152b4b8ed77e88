"""Tasks of lm-evaluation-harness, by name, on a model of ours. Needs the extra ``rwkv-train[lm-eval]``."""

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from jinja2 import TemplateError
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from rwkv_train.errors import ConfigError, DataError
from rwkv_train.evaluation.harness import RwkvTrainLM

_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
    "config",
    "lm_eval_version",
)
"""What is handed on of the harness' results: not its pages about the machine."""


def evaluate_tasks(
    model: RwkvTrainLM,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Run tasks.

    Args:
        model: the model, as the harness sees it.
        tasks: names of tasks, groups and tags, patterns such as ``pile_*``, or paths of YAML files.
        include_path: a folder with the YAML files of more tasks.
        num_fewshot: examples before each question, also where the task has another number; but a task that sets 0
            keeps it. ``None``: as each task says.
        limit: only the first of each task's documents; ``None``: all.

    Returns:
        What the harness found, as JSON's types: ``results`` by task and ``metric,filter``, and what describes them.

    Raises:
        ConfigError: a task is unknown, cannot be read or needs a package that is missing, or there is no such folder.
        DataError: a task's data is not here and cannot be downloaded; or a metric has no finite value.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"there is no folder {include_path}; it should hold YAML files of tasks")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    names = dict.fromkeys(name for asked in tasks for name in _find(asked, manager))
    try:
        # It would ask git about the folder that the user happens to be in, and git may complain on stderr.
        with mock.patch.object(evaluator, "get_git_commit_hash", return_value=None):
            results = evaluator.simple_evaluate(
                model=model,
                tasks=_build(names, manager),
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"the data of a task of {', '.join(tasks)} is not here and could not be downloaded: {error}; connect to "
            "the network once so that it is cached, or give a task that reads local files"
        ) from error
    except (yaml.YAMLError, TemplateError) as error:
        raise ConfigError(f"the YAML of a task of {', '.join(tasks)} cannot be used: {error}") from error
    except ImportError as error:
        raise ConfigError(f"a task of {', '.join(tasks)} needs a package that is missing: {error}") from error
    except OverflowError as error:
        raise DataError(
            f"a metric of {', '.join(tasks)} is beyond the largest number: the model predicts the text so badly that "
            f"a perplexity of a whole word or document has no value ({error})"
        ) from error
    kept = {name: results[name] for name in _KEPT if name in results}
    as_json: dict[str, Any] = json.loads(json.dumps(kept, default=handle_non_serializable))
    return as_json


def format_results(results: Mapping[str, Any]) -> str:
    """Return the harness' own tables of tasks and of groups, in Markdown."""
    tables = [make_table(results, column) for column in ("results", "groups") if column in results]
    return "\n\n".join(table.strip() for table in tables)


def _build(names: Iterable[str], manager: TaskManager) -> list[Any]:
    """Build the harness' objects of tasks and groups, apart from the evaluation, whose mistakes are not the user's.

    Raises:
        ConfigError: the harness cannot make a task of what its YAML says, or two groups have a task in common.
    """
    built: list[Any] = []
    name = ""
    try:
        for name in names:
            loaded = manager.load([name])
            # A group comes before the groups that it holds, and brings its tasks.
            built += [*loaded["groups"].values()][:1] or loaded["tasks"].values()
            for task in loaded["tasks"].values():
                for metric, how in task.aggregation().items():
                    if how is None:
                        raise ValueError(f"the metric {metric} has an aggregation that there is not")
        manager.load(built)  # refuses what is there twice
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"the harness cannot build the task {name}: {reason}; mend its YAML or leave it out"
        ) from error
    return built


def _find(asked: str, manager: TaskManager) -> list[str]:
    if Path(asked).suffix == ".yaml":
        if not Path(asked).is_file():
            raise ConfigError(f"there is no file {asked}; it should describe a task")
        return [asked]
    found: list[str] = manager.match_tasks([asked])
    if found:
        return found
    close = get_close_matches(asked, manager.all_tasks, n=3)
    hint = f"did you mean {' or '.join(repr(name) for name in close)}?" if close else "see `lm_eval ls tasks`"
    raise ConfigError(f"lm-evaluation-harness has no task '{asked}'; {hint}")
