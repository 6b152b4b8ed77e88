"""What a finetuning run comes to, counted by hand, and what is wrong with it, all of it at once."""

import json
import os
import shutil
from typing import NamedTuple

import pytest
import torch
import yaml

from rwkv_train.checkpoints import Weights, write_weights
from rwkv_train.checkpoints.infer import make_explicit
from rwkv_train.checkpoints.training_state import ParameterState, save_training_checkpoint
from rwkv_train.config.model import LoraRanks, Rwkv7Config
from rwkv_train.config.save import to_tree
from rwkv_train.errors import ConfigError
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.planning import finetune_plan
from rwkv_train.planning.finetune_plan import make_finetune_plan
from rwkv_train.planning.speed import Speed, measure_speed
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training.settings import load_finetune_settings, read_finetune_settings

C, L, V, T = 64, 2, 257, 16
CONFIG = Rwkv7Config(
    n_layer=L, n_embd=C, head_size=16, vocab_size=V, lora_ranks=LoraRanks(w=8, a=8, v=8, g=8)
)
N_BASE = sum(parameter.numel() for parameter in build_model(CONFIG, device="meta").parameters())
LINEARS = 4 * [(C, C)] + [(C, 4 * C), (4 * C, C)]
"""Inputs and outputs of a layer's linear layers: receptance, key, value, output; key and value of the channel mix."""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The path of published weights of a small RWKV-7."""
    model = build_model(CONFIG, wkv_backend="reference")
    initialize(model, seed=1)
    weights = Weights(CONFIG, model.state_dict(), None, None)
    return write_weights(tmp_path_factory.mktemp("base") / "base.pth", weights, "pth")


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """A device that trains 1000 tokens a second and scores 4000; finding that out takes seconds."""
    monkeypatch.setattr(finetune_plan, "measure_speed", lambda *_: Speed(1e-3, 2.5e-4))


@pytest.fixture
def texts(tmp_path):
    """Makes a dataset of texts of given lengths: of n letters the model reads n + 1 positions."""

    def make(name, *lengths):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in lengths))
        return {"path": str(path), "format": "text"}

    return make


@pytest.fixture
def file(base, tmp_path, texts):
    """Write settings with some values changed: ``file({"trainer.max_steps": 3})``; return the path."""

    def write(changes=None):
        tree = {
            "model": {"init_from": str(base), "ctx_len": T},
            "data": {"datasets": [texts("train", *5 * [7])], "tokenizer": "bytes"},
            "finetune": {"method": "full"},
            "optim": {"warmup_steps": 1},
            "trainer": {
                "out_dir": str(tmp_path / "run"),
                "max_steps": 2,
                "global_batch_size": 2,
                "micro_batch_size": 1,
                "accelerator": "cpu",
                "sample_tokens": 4,
            },
        }
        for name, value in (changes or {}).items():
            section, _, key = name.partition(".")
            if not key:
                tree[section] = value
            elif value is None:
                tree[section].pop(key)
            else:
                tree.setdefault(section, {})[key] = value
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    return write


@pytest.fixture
def plan_of(file):
    def make(changes=None, **more):
        verdict = make_finetune_plan(load_finetune_settings(file(changes)), **more)
        assert verdict.problems == ()
        return verdict.plan

    return make


@pytest.fixture
def problems_of(file):
    """The sentences that a dry run would print."""

    def find(changes=None, **more):
        settings, unreadable = read_finetune_settings(file(changes))
        verdict = make_finetune_plan(settings, unreadable, **more)
        assert verdict.plan is None
        return [str(problem) for problem in verdict.problems]

    return find


# ---- numbers


def test_low_rank_adapters_have_rank_times_inputs_and_outputs(plan_of):
    learning = plan_of({"finetune": {"method": "lora", "rank": 4}}).learning
    assert learning.n_trained == L * sum(4 * (n_in + n_out) for n_in, n_out in LINEARS)
    assert learning.n_adapted == L * len(LINEARS)
    assert learning.n_parameters == N_BASE
    assert learning.checkpoint_bytes == 12 * learning.n_trained  # a weight and two moments


@pytest.mark.parametrize(
    ("method", "n_trained"),
    [
        ({"method": "state"}, L * C * 16),
        ({"method": "prefix", "n_tokens": 3}, 3 * C),
        ({"method": "freeze", "train": ["head.*"]}, V * C),
        ({"method": "lora", "rank": 4, "variant": "miss"}, L * sum(4 * n_out for _, n_out in LINEARS)),
        (
            {"method": "lora", "rank": 4, "variant": "dora"},
            L * sum(4 * (n_in + n_out) + n_out for n_in, n_out in LINEARS),
        ),
    ],
    ids=["state", "prefix", "freeze", "miss", "dora"],
)
def test_what_learns_is_counted_for_every_method(plan_of, method, n_trained):
    plan = plan_of({"finetune": method})
    assert plan.learning.n_trained == n_trained
    assert f"{n_trained:,} ({n_trained / N_BASE:.2%})" in dict(plan.rows())["parameters that learn"]


def test_all_of_a_model_learns_but_what_takes_no_part(plan_of):
    unused = C + 2 * C * 8  # v0, v1 and v2 of the first block
    assert plan_of().learning.n_trained == N_BASE - unused


def test_frozen_parameters_have_no_gradients_and_quantized_ones_few_bytes(plan_of):
    plain, int8 = (plan_of({"finetune": {"method": "state", "quantize": kind}}) for kind in ("none", "int8"))
    n_trained, n_linear = L * C * 16, L * sum(n_in * n_out for n_in, n_out in LINEARS)
    # Parameters; then gradients and two moments of the states.
    assert plain.memory.weight_bytes == 4 * (N_BASE + n_trained)
    assert plain.memory.model_bytes == 4 * (N_BASE + n_trained) + 12 * n_trained
    scales = 4 * L * sum(n_out for _, n_out in LINEARS)
    assert plain.memory.model_bytes - int8.memory.model_bytes == 3 * n_linear - scales
    assert int8.learning.saved_bytes == 3 * n_linear - scales
    assert int8.learning.n_quantized == L * len(LINEARS)
    assert "quantized" in dict(int8.rows())
    assert "quantized" not in dict(plain.rows())


def test_an_epoch_is_dealt_by_hand(plan_of):
    """Five samples of 8 positions stand in three rows of 16; two rows a step."""
    plan = plan_of({"trainer.max_steps": None, "trainer.max_epochs": 1.0})
    assert (plan.data.n_rows, plan.data.n_tokens) == (3, 40)
    assert plan.course.length.n_steps == 2
    # The fourth row is the first one of the next epoch: 16 + 16 + 8 + 16 of 40 positions.
    ((_, epochs),) = plan.course.epochs
    assert epochs == pytest.approx(1.4)
    rows = dict(plan.rows())
    assert rows["rows an epoch"] == "3 of 16 tokens, 83.3% filled"
    assert rows["steps"] == "2, of which 1 warm up"
    assert rows["tokens in all"] == "64"
    assert rows["tokens a step"] == "32 in 2 micro-batches a device"
    # 64 positions at 1 ms.
    assert rows["time (estimate)"] == "about 0.064 seconds of training"


def test_tokens_are_counted_by_hand(plan_of, tmp_path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "xyz"}]
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": []}) + "\n")
    changes = {"data.datasets": [{"path": str(path)}], "data.bad_records": "drop"}
    (dataset,) = plan_of(changes).data.datasets
    # The end before it, "User: ab\n\nAssistant: xyz\n\n", the end after it; of these " xyz\n\n" and that are learned.
    assert (dataset.n_records, dataset.n_kept) == (2, 1)
    assert dataset.n_tokens == len("User: ab\n\nAssistant: xyz\n\n") + 1
    assert dataset.n_learned == len(" xyz\n\n") + 1
    assert dataset.n_segmented == 1
    rows = dict(plan_of(changes).rows())
    assert rows["samples by tokens"] == "up to 32: 1"
    assert rows["longer than a row"] == "1, read in segments of 16 tokens"
    assert rows[f"left out of {path}"].startswith(f"1: cannot be used, such as {path}, line 2: ")


def test_each_validation_and_what_it_scores_are_counted(plan_of, texts):
    changes = {
        "data.valid": [texts("valid", 3, 15)],
        "trainer.max_steps": 10,
        "trainer.val_every_n_steps": 4,
    }
    course = plan_of(changes).course
    ((name, n_samples, n_learned),) = course.held_out
    assert name.endswith("valid.jsonl")
    assert (n_samples, n_learned) == (2, 4 + 16)
    assert course.n_validations == 4  # before the first step, after 4, 8 and 10
    assert course.n_held_out_tokens == 2 * T
    # 10 steps of 32 positions at 1 ms; 4 validations of 32 at 0.25 ms.
    plan = plan_of(changes)
    assert plan.train_seconds == pytest.approx(0.32)
    assert plan.other_seconds == pytest.approx(0.032)


def test_a_part_of_the_data_is_held_out(plan_of):
    plan = plan_of({"data.valid_fraction": 0.4})
    assert plan.data.datasets[0].n_kept == 3
    assert plan.course.held_out[0].n_samples == 2


def test_checkpoints_that_are_there_at_once_are_counted(plan_of, texts):
    changes = {"trainer.max_steps": 50, "checkpoint": {"every_n_steps": 10, "keep_last": 2}}
    assert plan_of(changes).course.n_checkpoints == 3  # two are kept while the third is written
    assert plan_of({"checkpoint": {"every_n_steps": 10}}).course.n_checkpoints == 1  # the last step's


def test_the_model_before_the_run_reads_every_pair_once_for_dpo(plan_of, tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path.write_text(3 * (json.dumps(pair) + "\n"))
    pairs = {"data.datasets": [{"path": str(path), "format": "preference"}], "optim.l2wrap": 0.0}
    # Two texts of 24 positions stand in a row of 64.
    dpo, simpo = (
        plan_of({**pairs, "model.ctx_len": 64, "preference": {"loss": loss}}) for loss in ("dpo", "simpo")
    )
    assert dpo.data.n_tokens == 3 * 2 * len("User: a\n\nAssistant: b\n\n.")
    assert dpo.course.n_compared_tokens == 3 * 64
    assert simpo.course.n_compared_tokens == 0


def test_a_warm_up_longer_than_the_run_is_told(plan_of):
    rows = dict(plan_of({"optim.warmup_steps": 100}).rows())
    assert rows["steps"] == "2, and all of them warm up: optim.warmup_steps is 100"


@pytest.mark.parametrize(
    "method",
    [
        {"method": "lora", "variant": "pissa", "targets": ["blocks.1.*"]},
        {"method": "state", "quantize": "int8"},
    ],
    ids=["lora", "quantized"],
)
def test_a_speed_is_measured_in_a_real_model(file, method):
    settings = load_finetune_settings(file({"finetune": method}))
    found = measure_speed(settings, "reference", torch.device("cpu"), lambda text: [1])
    assert 0 < found.forward_seconds < found.train_seconds < 1


# ---- problems


def test_all_problems_are_named_at_once(problems_of, tmp_path, texts):
    (tmp_path / "file").write_text("")
    bad = [tmp_path / "bad1.jsonl", tmp_path / "bad2.jsonl"]
    for path in bad:
        path.write_text('{"text": "good"}\n{"txt": "bad"}\n{"text": 5}\n')
    found = problems_of(
        {
            "data.datasets": [{"path": str(path), "format": "text"} for path in bad],
            "data.valid": [{"path": str(tmp_path / "nowhere.jsonl"), "format": "text"}],
            "finetune": {"method": "lora", "targets": ["blocks.*.attention.*"]},
            "trainer.out_dir": str(tmp_path / "file" / "run"),
            "trainer.strategy": "deepspeed_2",
            "trainer.deepspeed_config": "nowhere.json",
            "trainer.wkv_backend": "foo",
        }
    )
    expected = [
        "trainer.deepspeed_config (nowhere.json) cannot be read",
        f"trainer.out_dir ({tmp_path / 'file' / 'run'}) cannot be made: {tmp_path / 'file'} is a file",
        f"data.datasets: 2 of 3 records of {bad[0]} cannot be used, the first is {bad[0]}, line 2: ",
        f"data.datasets: 2 of 3 records of {bad[1]} cannot be used, the first is {bad[1]}, line 2: ",
        "nowhere.jsonl",
        "trainer.wkv_backend: there is no backend 'foo'",
        "finetune.targets: 'blocks.*.attention.*' fits no linear layer",
    ]
    assert len(found) == len(expected)
    for part, sentence in zip(expected, found, strict=True):
        assert part in sentence


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"method": "lora", "rank": 65}, "finetune.rank (65) is too large for blocks.0.att.receptance"),
        ({"method": "freeze", "train": ["heads.*"]}, "finetune.train has 'heads.*', which fits no name"),
        (
            {"method": "lora", "lr_factors": {"emb.*": 2.0}},
            "finetune.lr_factors has 'emb.*', which fits no name",
        ),
        ({"method": "freeze", "frozen_layers": 3}, "finetune.frozen_layers is 3 but the model has 2 layers"),
        ({"method": "prefix", "text": ""}, "finetune.text is ''"),
    ],
    ids=["rank", "pattern", "lr_factors", "layers", "prefix"],
)
def test_a_method_that_does_not_fit_the_model_is_a_problem(problems_of, method, sentence):
    (found,) = problems_of({"finetune": method})
    assert sentence in found


def test_a_base_that_cannot_be_read_does_not_hide_what_is_wrong_with_the_data(problems_of):
    found = problems_of(
        {"model.init_from": "nowhere.pth", "data.datasets": [{"path": "nowhere.jsonl", "format": "text"}]}
    )
    assert len(found) == 2
    assert "nowhere.pth: there is no such file" in found[0]
    assert "nowhere.jsonl" in found[1]


def test_a_template_that_cannot_be_read_does_not_hide_that_data_are_missing(problems_of):
    found = problems_of(
        {"data.template": "nowhere.jinja", "data.datasets": [{"path": "nowhere.jsonl", "format": "text"}]}
    )
    assert len(found) == 2
    assert "nowhere.jinja" in found[0]
    assert "nowhere.jsonl" in found[1]


def test_a_template_that_fails_at_a_prompt_is_a_problem(problems_of, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('never') }}{% endif %}"
        "{{ m.content }}\n{% endfor %}"
    )
    found = problems_of({"data.template": str(template), "data.valid_fraction": 0.2, "prompts": ["no"]})
    assert len(found) == 1
    assert "never" in found[0]


def test_another_vocabulary_is_a_problem(problems_of):
    (found,) = problems_of({"data.tokenizer": "world"})
    n_tokens = load_tokenizer("world").vocab_size
    assert f"data.tokenizer 'world' has {n_tokens} tokens, more than the 257 of model.init_from" in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_a_problem(problems_of):
    assert any("the run needs 1 GPUs" in found for found in problems_of({"trainer.accelerator": "gpu"}))


def test_settings_name_all_their_problems_and_a_base_that_does_not_fit(file):
    with pytest.raises(ConfigError) as error:
        read_finetune_settings(file({"model.n_layer": 5, "trainer.seed": "x", "optim.lrr": 1}))
    for part in (
        "model.n_layer is 5 but 2 in the weights",
        "trainer.seed is 'x'",
        "optim.lrr: no such setting",
    ):
        assert part in str(error.value)


def test_settings_without_a_base_name_all_their_problems(file):
    with pytest.raises(ConfigError) as error:
        read_finetune_settings(file({"model.init_from": None, "trainer.seed": "x"}))
    for part in ("model.init_from is None", "trainer.seed is 'x'"):
        assert part in str(error.value)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(
    ("room", "sentence"),
    [(1.0, "cannot be written: it needs"), (2.5, "will hold 3 checkpoints at once")],
    ids=["no room for one", "no room for all"],
)
def test_a_disk_that_checkpoints_will_fill_is_a_problem(problems_of, monkeypatch, room, sentence):
    free = int(room * 12 * N_BASE)  # some space is asked for besides
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
    (found,) = problems_of({"trainer.max_steps": 50, "checkpoint": {"every_n_steps": 10, "keep_last": 2}})
    assert sentence in found


def save(settings, step):
    model = build_model(settings.model)
    manifest = {
        "step": step,
        "tokens": 0,
        "config": to_tree(settings),
        "arch_config": to_tree(make_explicit(settings.model)),
        "tokenizer": load_tokenizer("bytes").identity._asdict(),
        "random": {"cpu": ""},
        "train_seconds": 1.0,
        "data": {"train": {}},
    }
    parameters = [
        ParameterState(name, tensor.detach(), None, None) for name, tensor in model.named_parameters()
    ]
    save_training_checkpoint(settings.trainer.run_folder, manifest, parameters)


def test_another_run_in_the_folder_is_a_problem(problems_of, file):
    save(load_finetune_settings(file({"optim.lr": 1e-3})), step=1)
    (found,) = problems_of()
    assert "optim.lr is 0.0006 but 0.001 in" in found
    assert "choose another trainer.out_dir" in found
    (found,) = problems_of(resume="none")
    assert "already holds a run (step-00000001)" in found


def test_other_data_than_those_of_the_run_in_the_folder_are_a_problem(problems_of, file):
    save(load_finetune_settings(file()), step=1)
    (found,) = problems_of()
    assert "is not what" in found
    assert "step-00000001 was trained on" in found


def test_a_folder_that_cannot_be_written_to_is_a_problem(problems_of, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    (found,) = problems_of()
    assert "cannot be written to; choose another folder" in found


def test_nothing_is_written(plan_of, tmp_path):
    plan_of()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "train.jsonl"]
