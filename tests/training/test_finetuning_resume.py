"""Finetuning runs that were stopped, in the middle of long conversations too, end like those that were not."""

import csv
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from rwkv_train.checkpoints import open_training_checkpoint
from rwkv_train.data.instruct.templates import G1_SOURCE
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.training import preference_task, run
from rwkv_train.training.callbacks import RunCallback
from rwkv_train.training.finetuning import run_finetuning
from rwkv_train.training.guard import Guard
from rwkv_train.training.objective import NextTokenLoss

LORA = {"method": "lora", "rank": 4}
METHODS = {
    "full": {"method": "full"},
    "freeze": {"method": "freeze", "train": ["*.att.*", "head.*"], "frozen_layers": 1},
    "lora": {**LORA, "dropout": 0.3},
    "dora": {**LORA, "variant": "dora", "dropout": 0.1},
    "pissa": {**LORA, "variant": "pissa"},
    "miss": {**LORA, "variant": "miss"},
    "state": {"method": "state"},
    "prefix": {"method": "prefix", "n_tokens": 3},
    "int8 lora": {**LORA, "quantize": "int8"},
}


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """It takes as long as a run."""
    monkeypatch.setattr(run, "plot_run", lambda *_: None)


def stop_after(monkeypatch, step):
    """Send this process the signal of Ctrl-C when a step ends."""
    original = RunCallback._after_step

    def after_step(self, trainer, module):
        if module.completed_steps == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, trainer, module)

    monkeypatch.setattr(RunCallback, "_after_step", after_step)


def checkpoint(out_dir, step):
    return out_dir / f"checkpoints/step-{step:08d}"


def assert_same_checkpoint(one, other):
    """All tensors of all files are the same, bit for bit."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert {"model.safetensors", "optimizer.safetensors"} <= set(names)
    for name in names:
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


def metrics(out_dir, first=1):
    """The rows from a step on, without times."""
    with (out_dir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) >= first]
    return [
        {name: row[name] for name in row if "seconds" not in name and "per_second" not in name}
        for row in rows
    ]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_resumed_run_ends_like_an_undisturbed_one(chat_settings, tmp_path, method):
    changes = {"finetune": method, "trainer.max_steps": 5, "checkpoint.every_n_steps": 3}
    whole = run_finetuning(chat_settings(changes)).out_dir
    half_way = checkpoint(whole, 3)
    assert open_training_checkpoint(half_way).carried()  # some lane is in the middle of a conversation

    config = chat_settings({"trainer.out_dir": str(tmp_path / "resumed")})
    resumed = run_finetuning(config, resume=str(half_way)).out_dir

    assert_same_checkpoint(checkpoint(resumed, 5), checkpoint(whole, 5))
    assert metrics(resumed) == metrics(whole, first=4)


PAIRS = {"preference": {"loss": "dpo"}, "optim.l2wrap": 0.0}


@pytest.fixture
def pair_settings(chat_settings, chats):
    """As ``chat_settings``, for a run on pairs."""

    def make(changes=None):
        datasets = [{"path": str(chats / "pairs.jsonl"), "format": "preference"}]
        return chat_settings(
            {**PAIRS, "data.datasets": datasets, "data.valid_fraction": 0.2, **(changes or {})}
        )

    return make


def test_a_resumed_run_on_pairs_ends_like_an_undisturbed_one(pair_settings, tmp_path, monkeypatch):
    whole = run_finetuning(pair_settings({"finetune": LORA, "trainer.max_steps": 4})).out_dir
    stop_after(monkeypatch, 2)
    config = pair_settings({"trainer.out_dir": str(tmp_path / "stopped")})
    assert run_finetuning(config).completed_steps == 2
    monkeypatch.undo()
    monkeypatch.setattr(preference_task, "compute_reference", None)  # what was kept is enough
    resumed = run_finetuning(config).out_dir

    assert_same_checkpoint(checkpoint(resumed, 4), checkpoint(whole, 4))
    assert metrics(resumed) == metrics(whole)


def test_a_run_killed_before_its_first_checkpoint_has_its_reference(pair_settings, monkeypatch):
    config = pair_settings({"trainer.max_steps": 2})
    first = run_finetuning(config).out_dir
    kept = (first / "reference.safetensors").read_bytes()
    (first / "checkpoints").rename(first / "before")
    monkeypatch.setattr(preference_task, "compute_reference", None)

    run_finetuning(config)

    assert (first / "reference.safetensors").read_bytes() == kept
    assert_same_checkpoint(checkpoint(first, 2), first / "before/step-00000002")


def test_a_reference_of_other_pairs_is_refused(pair_settings, chats, tmp_path):
    out_dir = run_finetuning(pair_settings({"trainer.max_steps": 1})).out_dir
    shutil.rmtree(out_dir / "checkpoints")
    lines = (chats / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:-1]))
    datasets = [{"path": str(tmp_path / "fewer.jsonl"), "format": "preference"}]
    with pytest.raises(CheckpointError, match="belongs to other pairs"):
        run_finetuning(pair_settings({"data.datasets": datasets}))


def test_another_base_is_refused(chat_settings, base, tmp_path):
    path = tmp_path / "base.pth"
    shutil.copy(base, path)
    run_finetuning(chat_settings({"finetune": LORA, "trainer.max_steps": 1, "model.init_from": str(path)}))
    weights = torch.load(path, weights_only=True)
    weights["blocks.0.ffn.key.weight"][0, 0] += 1
    torch.save(weights, path)
    with pytest.raises(
        CheckpointError, match=r"is not the base of .*step-00000001.*give the weights that the run"
    ):
        run_finetuning(chat_settings({"trainer.max_steps": 2}))


def test_a_whole_model_goes_on_without_its_base(chat_settings, base, tmp_path):
    path = tmp_path / "base.pth"
    shutil.copy(base, path)
    run_finetuning(chat_settings({"trainer.max_steps": 1, "model.init_from": str(path)}))
    path.unlink()
    assert run_finetuning(chat_settings({"trainer.max_steps": 2})).completed_steps == 2


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"finetune": {"method": "state"}}, "finetune.method"),
        ({"finetune": {**LORA, "rank": 2}}, "finetune.rank"),
        ({"data.template": "other.jinja"}, "data.template"),
        ({"data.learn": "all"}, "data.learn"),
    ],
    ids=["method", "rank", "template", "learn"],
)
def test_another_run_is_not_resumed(chat_settings, base, monkeypatch, changes, name):
    (base.parent / "other.jinja").write_text(G1_SOURCE + "{# another #}")
    monkeypatch.chdir(base.parent)
    run_finetuning(chat_settings({"finetune": LORA, "trainer.max_steps": 1}))
    with pytest.raises(ConfigError, match=rf"^{name} is .* in .*step-00000001; set it back"):
        run_finetuning(chat_settings({**changes, "trainer.max_steps": 2}))


def test_states_go_with_their_lanes_to_other_micro_batches(chat_settings, tmp_path):
    """What is computed at once changes at the resumption; sums in another order change the last digits."""
    changes = {"finetune": {"method": "state"}, "trainer.max_steps": 6, "checkpoint.every_n_steps": 3}
    whole = run_finetuning(chat_settings(changes)).out_dir
    half_way = checkpoint(whole, 3)
    lanes = {int(name.partition(".")[0]) for name in open_training_checkpoint(half_way).carried()}
    assert lanes & {0, 1} and lanes & {2, 3}  # noqa: PT018 - of both micro-batches
    for size in (1, 4):
        out_dir = tmp_path / str(size)
        config = chat_settings({"trainer.out_dir": str(out_dir), "trainer.micro_batch_size": size})
        run_finetuning(config, resume=str(half_way))
        found, wanted = ([float(row["loss"]) for row in metrics(each, 4)] for each in (out_dir, whole))
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_run_that_goes_back_leaves_its_states_behind(chat_settings, tmp_path, monkeypatch):
    """After a bad step lanes go on in the middle of other conversations than those of the checkpoint."""
    seen = []
    original = NextTokenLoss._begin

    def begin(self, model, batch, context):
        seen.append((batch.first_sample // 4, dict(self._states)))
        return original(self, model, batch, context)

    judge = Guard.judge
    bad = []

    def judge_once(self, grad_norm, loss):
        bad.append(len(bad) == 4)
        return "made up" if bad[-1] else judge(self, grad_norm, loss)

    monkeypatch.setattr(NextTokenLoss, "_begin", begin)
    monkeypatch.setattr(Guard, "judge", judge_once)
    changes = {"trainer.max_steps": 5, "checkpoint.every_n_steps": 3, "guard.action": "rollback"}
    summary = run_finetuning(chat_settings({**changes, "trainer.micro_batch_size": 4}))

    assert summary.completed_steps == 5
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4, 5, 6]
    assert seen[4][1]  # of the checkpoint's next step, there were some
    assert not seen[5][1]
