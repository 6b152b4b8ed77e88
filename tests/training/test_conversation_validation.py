"""The held-out loss of a finetuning run, what it answers, when it ends, and which checkpoint is the best."""

import csv
import json
import math

import pytest
import torch

from rwkv_train.checkpoints import read_weights
from rwkv_train.checkpoints.retention import read_best
from rwkv_train.data.instruct.reading import read_conversations
from rwkv_train.models.registry import build_model
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training import run
from rwkv_train.training.finetuning import run_finetuning


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """It takes as long as a run."""
    monkeypatch.setattr(run, "plot_run", lambda *_: None)


@pytest.fixture
def held_out(chats):
    return {"data.valid": [{"path": str(chats / "valid.jsonl")}], "prompts": ["Hi", "state?"]}


def rows(out_dir):
    with (out_dir / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["val_loss"]]


def read_held_out(config):
    data = config.data.model_copy(update={"datasets": config.data.valid})
    return read_conversations(data, load_tokenizer("bytes"))


def losses_alone(weights, conversations):
    """Each conversation alone in one call: sum over learned tokens, and their number."""
    model = build_model(weights.config, wkv_backend="reference")
    model.load_state_dict(weights.tensors)
    model.double()
    total, count = 0.0, 0
    for one in conversations:
        tokens = torch.from_numpy(one.tokens.astype("int64"))
        with torch.no_grad():
            log_probs = torch.log_softmax(model(tokens[None, :-1]).logits[0], -1)
        learned = torch.from_numpy(one.is_learned[1:])
        total -= float(log_probs.gather(1, tokens[1:, None])[learned].sum())
        count += int(learned.sum())
    return total / count


def test_the_held_out_loss_is_that_of_each_conversation_alone(chat_settings, base, held_out):
    config = chat_settings({**held_out, "trainer.max_steps": 3, "trainer.val_every_n_steps": 2})
    summary = run_finetuning(config)
    (read,) = read_conversations(
        config.data.model_copy(update={"datasets": config.data.valid}), load_tokenizer("bytes")
    )
    assert max(one.n_inputs for one in read.samples) > 2 * config.model.ctx_len

    found = rows(summary.out_dir)
    assert [int(row["step"]) for row in found] == [0, 2, 3]
    wanted = losses_alone(read_weights(base), read.samples)
    assert float(found[0]["val_loss"]) == pytest.approx(wanted, rel=1e-5)
    wanted = losses_alone(read_weights(summary.checkpoint), read.samples)
    assert float(found[2]["val_loss"]) == pytest.approx(wanted, rel=1e-5)
    for row in found:
        assert float(row["val_perplexity"]) == pytest.approx(math.exp(float(row["val_loss"])), rel=1e-6)

    text = (summary.out_dir / "samples.txt").read_text()
    for step in (0, 2, 3):
        assert f"--- step {step}\n> Hi\n" in text
    assert text.count("> state?\n") == 3
    best = min(found[1:], key=lambda row: float(row["val_loss"]))
    assert read_best(summary.out_dir).step == int(best["step"])


def test_several_held_out_sets_are_pooled_by_token(chat_settings, chats, tmp_path):
    other = tmp_path / "other.jsonl"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "key"}]
    other.write_text(json.dumps({"messages": turns}))
    config = chat_settings(
        {
            "data.valid": [{"path": str(chats / "valid.jsonl")}, {"path": str(other)}],
            "trainer.max_steps": 1,
        }
    )
    row = rows(run_finetuning(config).out_dir)[0]
    read = read_conversations(
        config.data.model_copy(update={"datasets": config.data.valid}), load_tokenizer("bytes")
    )
    by_name = {one.dataset.path: sum(each.n_learned for each in one.samples) for one in read}
    nats = sum(float(row[f"val_loss/{name}"]) * count for name, count in by_name.items())
    assert float(row["val_loss"]) == pytest.approx(nats / sum(by_name.values()), rel=1e-6)


def test_a_run_that_learns_no_more_ends(chat_settings, held_out):
    changes = {"optim.lr": 1e-30, "optim.lr_final": 1e-30, "trainer.early_stopping_patience": 2}
    changes |= {"trainer.val_every_n_steps": 1, "prompts": []}
    summary = run_finetuning(chat_settings({**held_out, **changes}))
    assert summary.completed_steps == 2
    assert "2 validations in a row" in summary.ended_early


@pytest.mark.parametrize("loss", ["dpo", "orpo", "simpo"])
def test_held_out_pairs_have_loss_and_rewards(chat_settings, chats, loss):
    config = chat_settings(
        {
            "data.datasets": [{"path": str(chats / "pairs.jsonl"), "format": "preference"}],
            "data.valid_fraction": 0.2,
            "preference": {"loss": loss},
            "optim.l2wrap": 0.0,
            "trainer.max_steps": 1,
        }
    )
    summary = run_finetuning(config)
    first = rows(summary.out_dir)[0]
    margin = float(first["val_reward_chosen"]) - float(first["val_reward_rejected"])
    assert float(first["val_reward_margin"]) == pytest.approx(margin, abs=1e-6)
    if loss == "dpo":  # the model is its own reference
        assert float(first["val_loss"]) == pytest.approx(math.log(2), rel=1e-6)
        assert margin == pytest.approx(0, abs=1e-5)
    assert summary.validation.pooled.documents == 6
