"""Every method in a run: what it learns, what it leaves as it is, and its files in the hands of others."""

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_train.checkpoints import convert, load_model, read_weights
from rwkv_train.checkpoints.manifest import STATE_FILE
from rwkv_train.checkpoints.states import read_state_file
from rwkv_train.config.load import check_finetune_tree, check_tree, fill_sizes
from rwkv_train.config.save import to_tree
from rwkv_train.data.instruct.reading import read_conversations
from rwkv_train.data.prepare import prepare_data
from rwkv_train.finetuning.adapters import base_name
from rwkv_train.models.start import FixedStart
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training.finetuning import open_finetuning_task
from rwkv_train.training.loggers import read_metrics
from rwkv_train.training.resume import AUTO
from rwkv_train.training.run import run_pretraining, run_task

STEPS = 40
MARGIN, MARGIN_OF_A_START = 1.0, 0.2
"""In nats per token: by how much the held-out loss falls at least; where nothing learns, it does not change.

A state or prefix says which letters come, at the beginning alone; what is in the weights stays to the end.
"""
LORA = {"method": "lora", "rank": 8}
METHODS = {
    "full": ({"method": "full"}, 5e-3),
    "freeze": ({"method": "freeze", "frozen_layers": 1, "train": ["*.att.*", "head.*"]}, 5e-3),
    "lora": (LORA, 2e-2),
    "dora": ({**LORA, "variant": "dora"}, 2e-2),
    "pissa": ({**LORA, "variant": "pissa"}, 5e-3),
    "miss": ({**LORA, "variant": "miss"}, 2e-2),
    "state": ({"method": "state"}, 1.0),
    "prefix": ({"method": "prefix", "n_tokens": 16}, 0.3),
    "lora, int8": ({**LORA, "quantize": "int8"}, 2e-2),
    "lora, nf4": ({**LORA, "quantize": "nf4"}, 2e-2),
}
RUNS = [("rwkv7", name) for name in METHODS]
RUNS += [(arch, name) for arch in ("rwkv4", "rwkv6") for name in ("lora", "state")] + [("rwkv5", "state")]
RANKS = {"rwkv6": {"shift": 8, "decay": 8}, "rwkv7": {"w": 8, "a": 8, "v": 8, "g": 8}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts that show what is to be remembered, and questions whose answers are of four letters alone.

    Each text draws from four letters of its own. A base that has read such texts predicts by what its state has of the
    text so far, which is what a learned state or prefix can use.
    """
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)
    letters = string.ascii_lowercase
    texts = [{"text": "".join(generator.choices(generator.sample(letters, 4), k=62))} for _ in range(2400)]
    _write(folder / "texts.jsonl", texts)
    prepare_data([folder / "texts.jsonl"], load_tokenizer("bytes"), folder / "texts")
    for split, n_conversations in (("train", 400), ("valid", 24)):
        turns = [
            ("".join(generator.choices(letters, k=6)), "".join(generator.choices("aeos", k=12)))
            for _ in range(n_conversations)
        ]
        _write(
            folder / f"{split}.jsonl", [{"prompt": asked, "completion": answer} for asked, answer in turns]
        )
        pairs = [
            {"prompt": asked, "chosen": answer, "rejected": "".join(generator.choices("aeos", k=11)) + "x"}
            for asked, answer in turns
        ]
        _write(folder / f"{split}-pairs.jsonl", pairs)
    return folder


def _write(path, records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")


@pytest.fixture(scope="module")
def bases(data):
    """Pretrains a small model of a version, when it is first asked for."""
    made = {}

    def make(arch):
        if arch not in made:
            model = {"arch": arch, "n_layer": 2, "n_embd": 64, "vocab_size": 257, "ctx_len": 64}
            model |= {} if arch == "rwkv4" else {"head_size": 32}
            model |= {"lora_ranks": RANKS[arch]} if arch in RANKS else {}
            settings = {
                "model": model,
                "data": {"train": str(data / "texts"), "tokenizer": "bytes"},
                "optim": {"lr": 1e-2, "lr_final": 1e-3},
                "trainer": trainer_of(data / arch, 100 if arch == "rwkv7" else 50)
                | {"global_batch_size": 8, "micro_batch_size": 8},
            }
            made[arch] = run_pretraining(check_tree(settings)).checkpoint
        return made[arch]

    return make


def trainer_of(out_dir, steps):
    return {
        "out_dir": str(out_dir),
        "max_steps": steps,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "accelerator": "cpu",
        "sample_tokens": 0,
        "val_every_n_steps": 1000,
    }


@pytest.fixture(scope="module")
def runs(bases, data, tmp_path_factory):
    """Finetunes a base by a method, once; returns the task, which has the model, the summary and the validations."""
    made = {}

    def make(arch, name):
        if (arch, name) not in made:
            tree = settings_of(bases(arch), tmp_path_factory.mktemp("run"), *METHODS[name])
            for part, split in (("datasets", "train"), ("valid", "valid")):
                path = str(data / f"{split}.jsonl")
                tree["data"][part] = [{"path": path, "format": "prompt-completion"}]
            made[arch, name] = finetune(tree)
        return made[arch, name]

    return make


def settings_of(base, out_dir, method, lr):
    tree = {
        "model": {"init_from": str(base), "ctx_len": 128},
        "data": {"tokenizer": "bytes"},
        "finetune": method,
        "optim": {"lr": lr, "lr_final": lr / 10, "warmup_steps": 2, "weight_decay": 0.0, "l2wrap": 0.0},
        "trainer": trainer_of(out_dir, STEPS),
    }
    return fill_sizes(tree, to_tree(read_weights(base).config))


def finetune(tree):
    task = open_finetuning_task(check_finetune_tree(tree))
    summary = run_task(task.config, lambda: task, AUTO, ())
    rows = [row for row in read_metrics(summary.out_dir / "metrics.csv") if row["val_loss"]]
    return task, summary, rows


def model_of(base, method, summary):
    """The finetuned model as other commands get it."""
    if method["method"] == "lora":
        return load_model(base, adapter=summary.out_dir)[0]
    if method["method"] in ("state", "prefix"):
        model, weights = load_model(base)
        model.start = FixedStart(read_state_file(summary.checkpoint / STATE_FILE, weights.config))
        return model
    return load_model(summary.checkpoint)[0]


@torch.no_grad()
def loss_of_each_alone(model, config):
    """The mean over the learned tokens, one conversation after another, none packed."""
    held_out = config.data.model_copy(update={"datasets": config.data.valid})
    (dataset,) = read_conversations(held_out, load_tokenizer("bytes"))
    nats, n_tokens = 0.0, 0
    for conversation in dataset.samples:
        tokens = torch.from_numpy(conversation.tokens.astype("int64"))
        log_probs = model(tokens[None, :-1]).logits[0].double().log_softmax(-1)
        learned = torch.from_numpy(conversation.is_learned[1:])
        nats -= log_probs[torch.arange(len(tokens) - 1), tokens[1:]][learned].sum().item()
        n_tokens += int(learned.sum())
    return nats / n_tokens


@pytest.mark.parametrize(("arch", "name"), RUNS, ids=[f"{arch}, {name}" for arch, name in RUNS])
def test_the_held_out_loss_falls_and_what_is_frozen_stays(bases, runs, arch, name):
    base, (method, _) = bases(arch), METHODS[name]
    task, _, rows = runs(arch, name)
    before, after = float(rows[0]["val_loss"]), float(rows[-1]["val_loss"])

    assert (rows[0]["step"], rows[-1]["step"]) == ("0", str(STEPS))
    is_start = method["method"] in ("state", "prefix")
    assert after < before - (MARGIN_OF_A_START if is_start else MARGIN)

    weights = read_weights(base).tensors
    frozen = {
        "full": set(),
        "freeze": {key for key in weights if not key.startswith(("blocks.1.att.", "head."))},
    }.get(name, set(weights))
    changes_the_base_on_purpose = "quantize" in method or method.get("variant") == "pissa"
    seen = set()
    for key, parameter in task._model.named_parameters():
        official = base_name(key)
        if official in frozen:
            seen.add(official)
            assert not parameter.requires_grad
            assert changes_the_base_on_purpose or torch.equal(parameter, weights[official]), key
    assert seen == frozen or "quantize" in method


@pytest.mark.parametrize(("arch", "name"), RUNS, ids=[f"{arch}, {name}" for arch, name in RUNS])
def test_its_files_give_the_loss_that_the_run_reported(bases, runs, arch, name):
    method, _ = METHODS[name]
    task, summary, rows = runs(arch, name)

    loss = loss_of_each_alone(model_of(bases(arch), method, summary), task.config)

    # A quantized base is rounded in the run and whole here.
    tolerance = {"int8": 0.02, "nf4": 0.3}.get(method.get("quantize"), 2e-5)
    assert loss == pytest.approx(float(rows[-1]["val_loss"]), abs=tolerance)


@pytest.mark.parametrize("loss", ["dpo", "orpo", "simpo"])
def test_of_two_answers_the_right_one_becomes_likelier(bases, data, tmp_path, loss):
    tree = settings_of(bases("rwkv7"), tmp_path / "run", LORA, 1e-2)
    for part, split in (("datasets", "train"), ("valid", "valid")):
        tree["data"][part] = [{"path": str(data / f"{split}-pairs.jsonl"), "format": "preference"}]

    _, _, rows = finetune(tree | {"preference": {"loss": loss}})

    assert float(rows[-1]["val_loss"]) < 0.8 * float(rows[0]["val_loss"])
    assert float(rows[-1]["val_reward_accuracy"]) > 0.9


@pytest.mark.parametrize("arch", ["rwkv6", "rwkv7"])
def test_the_package_rwkv_writes_the_same_tokens_with_the_merged_pth(bases, runs, arch, tmp_path):
    _, summary, _ = runs(arch, "lora")
    convert(bases(arch), tmp_path / "model.pth", "pth", adapter=summary.out_dir)
    tokens = [0, *load_tokenizer("bytes").encode("User: queens\n\nAssistant:")]
    model, _ = load_model(tmp_path / "model.pth")
    with torch.no_grad():
        for _ in range(40):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    torch.save(torch.tensor(tokens), tmp_path / "tokens.pt")

    script = Path(__file__).parents[1] / "parity" / "run_pypi_rwkv.py"
    command = [sys.executable, script, str(int(arch == "rwkv7")), "2", tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr

    # The package reads what we wrote; where it chooses each next token alike, it would have written the same.
    theirs = torch.load(tmp_path / "logits.pt")["recurrent"].argmax(-1).tolist()
    assert theirs[-41:-1] == tokens[-40:]
