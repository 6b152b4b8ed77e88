"""``python -m tests.finetuning.method_table``: what every method learns, as a table with memory and speed.

A small RWKV-7 is pretrained on the built-in corpus. It then rehearses the built-in tasks in another notation, without
instructions (:func:`write_rehearsal`): a model of this size that has only read prose cannot swap two words, which
a learned state or prefix, beside weights that stay as they are, could call up. These weights are the base of all
methods. Each method finetunes it on the built-in instructions in a process of its own, and answers held-out ones
greedily, through the files that a user takes: the run's weights, the base with the adapter merged, or with the state.
No pair of words of the held-out tasks is in any of the training.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwkv_train.benchmarks.environment import describe_environment
from rwkv_train.checkpoints.manifest import STATE_FILE
from rwkv_train.checkpoints.states import read_state_file
from rwkv_train.checkpoints.weights import load_model
from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.config.methods import LoraMethod, PrefixMethod, StateMethod
from rwkv_train.data.instruct.builtin import builtin_records
from rwkv_train.data.instruct.conversation import Message
from rwkv_train.data.instruct.templates import ChatTemplate
from rwkv_train.finetuning.method import apply_method
from rwkv_train.generation.sampling import SamplingSettings
from rwkv_train.generation.side_by_side import Prompt, generate_side_by_side
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.start import FixedStart
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training.finetuning import run_finetuning
from rwkv_train.training.loggers import METRICS_FILE, read_metrics
from rwkv_train.training.run import RunSummary, run_pretraining
from rwkv_train.training.settings import load_finetune_settings, load_settings

logger = logging.getLogger("tests.finetuning.method_table")

Row = dict[str, Any]

PRETRAINED, BASE, FINETUNED = "pretrained", "base", "full"
"""Names of runs that others start from."""
N_ANSWERS = 48
"""Held-out instructions that are answered."""
SIZES = {
    "arch": "rwkv7",
    "n_layer": 3,
    "n_embd": 128,
    "head_size": 64,
    "lora_ranks": {"w": 16, "a": 16, "v": 16, "g": 32},
    "vocab_size": 257,
    "ctx_len": 128,
}
PRETRAINING = {
    "model": SIZES,
    "data": {"train": "builtin", "valid": "builtin", "tokenizer": "bytes"},
    "optim": {"lr": 4e-3, "lr_final": 4e-4, "warmup_steps": 20},
    "trainer": {"max_steps": 150, "global_batch_size": 16, "micro_batch_size": 16, "val_tokens": 5000},
}
REHEARSAL_STEPS = 130
PAIR_TOKENS = 512
"""Of a row of pairs: both conversations of a pair stand in one."""


class Trial(NamedTuple):
    """A way to finetune."""

    finetune: dict[str, Any]
    """The section of the settings."""
    lr: float
    loss: str | None = None
    """Of preferences; ``None``: learn from conversations."""
    start: str = BASE
    length: float = 1
    """Factor of the number of steps."""


LORA = {"method": "lora", "rank": 16}
PISSA = {**LORA, "variant": "pissa", "alpha": 16}
TRIALS = {
    "full": Trial({"method": "full"}, 2e-3),
    "freeze (top 2 of 3 layers)": Trial({"method": "freeze", "frozen_layers": 1}, 2e-3),
    "lora": Trial(LORA, 5e-3),
    "lora, rslora": Trial({**LORA, "alpha": 16, "rslora": True}, 3e-3),
    "lora, dora": Trial({**LORA, "variant": "dora"}, 5e-3),
    "lora, pissa": Trial(PISSA, 2e-3),
    "lora, miss": Trial({**LORA, "variant": "miss"}, 2e-3),
    "state": Trial({"method": "state"}, 0.3),
    "prefix (32 tokens)": Trial({"method": "prefix", "n_tokens": 32}, 0.05),
    "state, longer": Trial({"method": "state"}, 0.3, length=3),
    "prefix, longer": Trial({"method": "prefix", "n_tokens": 32}, 0.05, length=3),
    "lora, int8": Trial({**LORA, "quantize": "int8"}, 5e-3),
    "lora, nf4": Trial({**LORA, "quantize": "nf4"}, 5e-3),
    "state, int8": Trial({"method": "state", "quantize": "int8"}, 0.3),
    "orpo, lora": Trial(LORA, 5e-3, "orpo", length=0.3),
    "dpo, lora, after full": Trial(LORA, 5e-4, "dpo", FINETUNED, 0.3),
    "simpo, lora, after full": Trial(LORA, 5e-4, "simpo", FINETUNED, 0.3),
}


def write_rehearsal(path: Path) -> None:
    """Write the built-in tasks on the pairs of words of the training split as lines of text: ``swap(a, b) = b a``."""
    pairs = sorted({_pair(question) for question, _ in _questions("train")})
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(8000):
            lines = [_line(generator, *generator.choice(pairs)) for _ in range(4)]
            file.write(json.dumps({"text": "\n".join(lines) + "\n"}) + "\n")


def _line(generator: random.Random, one: str, other: str) -> str:
    return generator.choice(
        [
            f"swap({one}, {other}) = {other} {one}",
            f"upper({one}, {other}) = {one.upper()} {other.upper()}",
            f"first({one}, {other}) = {min(one, other)}",
            f"spell({one}, {other}) = {'-'.join(one)} {'-'.join(other)}",
        ]
    )


def _questions(split: str) -> Iterator[tuple[str, str]]:
    """Yield the first question of each conversation, with its answer."""
    for record in builtin_records(split):
        turns = [message["content"] for message in record.fields["messages"] if message["role"] != "system"]
        yield turns[0], turns[1]


def _pair(question: str) -> tuple[str, str]:
    words = question.removesuffix("?").replace(" or ", " ").replace(",", "").split()
    return words[-2], words[-1]


def measure(name: str, work: Path, base: Path | None, steps: int) -> Row:
    """Do a run and return what it came to; asked of a fresh process."""
    if name == PRETRAINED:
        return _pretrain(work)
    start = base if base is not None and _trial(name).start == BASE else work / _start_of(name)
    config = _load(work, name, _settings(name, work, start, steps))
    imports_rss, cpu = _peak_rss(), time.process_time()
    summary = run_finetuning(config)
    cpu, peak_rss = time.process_time() - cpu, _peak_rss()
    losses = _validations(work / name)
    is_pairs = config.preference is not None
    row: Row = {
        "method": name,
        "learning_rate": config.optim.lr,
        "steps": summary.n_steps,
        "trained_parameters": _n_trained(config),
        "imports_rss_mib": imports_rss,
        "peak_rss_mib": peak_rss,
        "tokens_per_second": summary.tokens / summary.train_seconds,
        "tokens_per_cpu_second": summary.tokens / cpu,
        "loss_unit": "nats/pair" if is_pairs else "nats/token",
        "loss_before": losses[0],
        "loss_after": losses[-1],
    }
    if is_pairs:
        row["pairs_right"] = _validations(work / name, "val_reward_accuracy")[-1]
    model = _result(config, start, summary)
    return row | answer(model)


def _pretrain(work: Path) -> Row:
    config_path = _write(work, PRETRAINED, PRETRAINING)
    summary = run_pretraining(load_settings(str(config_path)))
    validations = _validations(work / PRETRAINED)
    return {
        "method": PRETRAINED,
        "steps": summary.n_steps,
        "loss_before": validations[0],
        "loss_after": validations[-1],
    }


def _validations(folder: Path, column: str = "val_loss") -> list[float]:
    rows = read_metrics(folder / METRICS_FILE)
    return [float(row[column]) for row in rows if row.get(column) not in (None, "")]


def _trial(name: str) -> Trial:
    return Trial({"method": "full"}, 3e-3, start=PRETRAINED) if name == BASE else TRIALS[name]


def _start_of(name: str) -> str:
    return _trial(name).start


def _settings(name: str, work: Path, start: Path, steps: int) -> dict[str, Any]:
    trial = _trial(name)
    if name == BASE:
        path = work / "rehearsal.jsonl"
        write_rehearsal(path)
        data: dict[str, Any] = {"datasets": [{"path": str(path), "format": "text"}], "valid_fraction": 0.01}
    else:
        kind = {"path": "builtin"} if trial.loss is None else {"path": "builtin", "format": "preference"}
        data = {"datasets": [kind], "valid": [{**kind, "split": "valid"}]}
    n_rows = 16 if name == BASE else 8 if trial.loss is None else 2
    tree: dict[str, Any] = {
        "model": {
            "init_from": str(start),
            "ctx_len": SIZES["ctx_len"] if trial.loss is None else PAIR_TOKENS,
        },
        "data": {**data, "tokenizer": "bytes"},
        "finetune": trial.finetune,
        "optim": {
            "lr": trial.lr,
            "lr_final": trial.lr / 20,
            "warmup_steps": 10,
            "weight_decay": 0.0,
            "l2wrap": 0.0,
        },
        "trainer": {
            "max_steps": REHEARSAL_STEPS if name == BASE else round(steps * trial.length),
            "global_batch_size": n_rows,
            "micro_batch_size": n_rows,
        },
    }
    return tree if trial.loss is None else {**tree, "preference": {"loss": trial.loss}}


def _write(work: Path, name: str, tree: dict[str, Any]) -> Path:
    trainer = {
        "log_every_n_steps": 10,
        "val_every_n_steps": 1_000_000,  # before the first step, and after the last
        "sample_tokens": 0,
        **tree["trainer"],
        "out_dir": str(work / name),
        "accelerator": "cpu",
    }
    path = work / f"{name}.yaml"
    whole = {**tree, "trainer": trainer, "checkpoint": {"every_n_steps": 1_000_000}}
    path.write_text(json.dumps(whole, indent=2), encoding="utf-8")
    return path


def _load(work: Path, name: str, tree: dict[str, Any]) -> FinetuneConfig:
    return load_finetune_settings(str(_write(work, name, tree)))


def _n_trained(config: FinetuneConfig) -> int:
    assert config.model.init_from is not None
    model, _ = load_model(config.model.init_from)
    apply_method(model, config.finetune, load_tokenizer("bytes").encode, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _result(config: FinetuneConfig, start: Path, summary: RunSummary) -> LanguageModel:
    """Return the model of a run as other commands get it; also a quantized base is whole again here."""
    assert summary.checkpoint is not None
    if isinstance(config.finetune, LoraMethod):
        return load_model(start, adapter=summary.out_dir)[0]
    if isinstance(config.finetune, StateMethod | PrefixMethod):
        model, weights = load_model(start)
        model.start = FixedStart(read_state_file(summary.checkpoint / STATE_FILE, weights.config))
        return model
    return load_model(summary.checkpoint)[0]


def answer(model: LanguageModel) -> Row:
    """Let a model answer held-out instructions greedily; count those that are right, by task."""
    tokenizer, template = load_tokenizer("bytes"), ChatTemplate("g1")
    asked = list(islice(_questions("valid"), N_ANSWERS))
    prompts = [
        Prompt(
            [tokenizer.end_of_document, *tokenizer.encode(template.prompt([Message("user", question)]))],
            SamplingSettings(temperature=0.0),
            max_tokens=40,
            stop=(template.turn_end(),),
        )
        for question, _ in asked
    ]
    texts = dict(generate_side_by_side(model, tokenizer, prompts, batch_size=16))
    right: dict[str, list[int]] = {}
    for number, (question, expected) in enumerate(asked):
        counts = right.setdefault(question.split()[0].lower(), [0, 0])
        counts[0] += texts[number].strip() == expected
        counts[1] += 1
    return {
        "answers_right": sum(count for count, _ in right.values()),
        "answers_asked": len(asked),
        "answers_right_by_task": {task: f"{count}/{of}" for task, (count, of) in sorted(right.items())},
        "examples": [[question, texts[number].strip()] for number, (question, _) in enumerate(asked[:6])],
    }


def _peak_rss() -> float:
    # Not getrusage: what it tells of a new process begins with the memory of its parent.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024  # of KiB


COLUMNS = {
    "trained_parameters": "d",
    "peak_rss_mib": ".0f",
    "tokens_per_second": ".0f",
    "tokens_per_cpu_second": ".0f",
    "loss_before": ".4f",
    "loss_after": ".4f",
    "pairs_right": ".3f",
}


def as_markdown(rows: list[Row]) -> str:
    """Return the table."""
    lines = [f"| method | {' | '.join(COLUMNS)} | right answers |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in rows:
        cells = [f"{row[name]:{shown}}" if name in row else "" for name, shown in COLUMNS.items()]
        answers = f"{row['answers_right']} of {row['answers_asked']}" if "answers_right" in row else ""
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {answers} |")
    return "\n".join(lines)


def _answers_of(row: Row) -> Row:
    return {name: value for name, value in row.items() if name.startswith("answers")}


def _in_own_process(name: str, given: argparse.Namespace) -> Row:
    path = given.work / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "tests.finetuning.method_table", "--only", name]
    command += ["--work", str(given.work), "--steps", str(given.steps)]
    command += ["--base", str(given.base)] if given.base else []
    with (given.work / f"{name}.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed; see {given.work / name}.log")
    path.write_text(done.stdout, encoding="utf-8")
    row: Row = json.loads(done.stdout)
    logger.info("%s: %s", name, row)
    return row


def main() -> None:
    """Do every run; print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m tests.finetuning.method_table")
    parser.add_argument("--steps", type=int, default=130, help="steps of a method (130)")
    parser.add_argument("--methods", nargs="*", default=list(TRIALS), help="only these rows")
    parser.add_argument("--base", type=Path, help="weights to finetune, instead of making them")
    parser.add_argument("--jobs", type=int, default=1, help="methods that run at once (1)")
    parser.add_argument("--work", type=Path, help="folder of the runs; what is done there is not done again")
    parser.add_argument("--out", type=Path, help="also write the rows to this file")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        sys.stdout.write(json.dumps(measure(given.only, given.work, given.base, given.steps)))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        given.work = given.work or Path(folder)
        given.work.mkdir(parents=True, exist_ok=True)
        before = [] if given.base else [_in_own_process(name, given) for name in (PRETRAINED, BASE)]
        first = [name for name in given.methods if TRIALS[name].start == BASE]
        then = [name for name in given.methods if name not in first]
        with ThreadPoolExecutor(given.jobs) as pool:
            rows = [
                row
                for names in (first, then)
                for row in pool.map(lambda name: _in_own_process(name, given), names)
            ]
    untrained = [{"method": name, **_answers_of(row)} for row in before if (name := row["method"]) == BASE]
    sys.stdout.write(as_markdown([*untrained, *rows]) + "\n")
    if given.out:
        environment = {
            **describe_environment(torch.device("cpu")),
            "command": " ".join(["python -m tests.finetuning.method_table", *sys.argv[1:]]),
            "load_before": load_before,
            "bitsandbytes": version("bitsandbytes"),
            "peft": version("peft"),
        }
        content = {"environment": environment, "sizes": SIZES, "base": before, "results": rows}
        given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
