"""What a step of finetuning learns: the loss by hand, masks, rows, learning rates."""

import csv
import json

import pytest
import torch

from rwkv_train.checkpoints import load_training_checkpoint, read_weights
from rwkv_train.config.methods import LoraMethod, PrefixMethod
from rwkv_train.config.optim import OptimConfig
from rwkv_train.data.instruct.batches import ConversationBatches
from rwkv_train.data.module import Position
from rwkv_train.finetuning.adapters import inject_adapter
from rwkv_train.finetuning.states import learn_prefix, learn_state
from rwkv_train.models.registry import build_model
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training import run
from rwkv_train.training.finetuning import open_finetuning_task, run_finetuning
from rwkv_train.training.objective import NextTokenLoss
from rwkv_train.training.param_groups import parameter_groups

MICRO_BATCHES = [pytest.param(4, id="at once"), pytest.param(2, id="in two")]


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """It takes as long as a run."""
    monkeypatch.setattr(run, "plot_run", lambda *_: None)


@pytest.fixture
def model(base):
    """The base in float64, computed by the formulas."""
    weights = read_weights(base)
    made = build_model(weights.config, wkv_backend="reference")
    made.load_state_dict(weights.tensors)
    return made.double()


@pytest.fixture
def write_chats(tmp_path, chat_settings):
    """Settings of a run on these conversations."""

    def write(records, changes=None):
        path = tmp_path / "own.jsonl"
        path.write_text("\n".join(json.dumps({"messages": turns}) for turns in records))
        return chat_settings({"data.datasets": [{"path": str(path)}], **(changes or {})})

    return write


def turn(role, text):
    return {"role": role, "content": text}


def short_chats(count=24):
    """Of 39 to 43 tokens in two turns, or 25 to 29 in one; a row of 64 holds two of them."""
    chats = [[turn("user", f"{n}?"), turn("assistant", str(2 * n))] for n in range(count)]
    return [
        chat + [turn("user", "?"), turn("assistant", "Y.")] * (n % 2 == 0) for n, chat in enumerate(chats)
    ]


def nats(model, conversation):
    """Loss of a conversation that stands alone, summed over what is learned, with the formula written out."""
    tokens = torch.from_numpy(conversation.tokens.astype("int64"))
    log_probs = torch.log_softmax(model(tokens[None, :-1]).logits[0], dim=-1)
    learned = torch.from_numpy(conversation.is_learned[1:])
    return -(log_probs.gather(1, tokens[1:, None])[:, 0] * learned).sum()


def metrics(out_dir):
    with (out_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def steps_of(task):
    config = task.config
    batches = ConversationBatches(task.samples, config, 0, Position(0), config.trainer.max_steps)
    return [batches[index] for index in range(len(batches))]


def test_what_is_learned_is_what_the_assistant_says_and_its_end(write_chats):
    (conversation,) = open_finetuning_task(write_chats(short_chats(1))).samples.datasets[0]
    learned = load_tokenizer("bytes").decode_bytes(conversation.tokens[conversation.is_learned].tolist())
    assert learned == b" 0\n\n Y.\n\n"


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
def test_loss_and_gradient_of_a_step_are_those_of_its_conversations_alone(
    write_chats, model, micro_batch_size
):
    changes = {"trainer.max_steps": 1, "trainer.micro_batch_size": micro_batch_size, "optim.l2wrap": 0.0}
    config = write_chats(short_chats(), changes)
    row = metrics(run_finetuning(config).out_dir)[0]

    samples = open_finetuning_task(config).samples
    parts = [part for dealt in samples.dealer.step(0).rows for part in dealt.row.parts]
    assert len(parts) > 4  # several in a row
    inside = [samples[part.conversation] for part in parts]
    loss = sum(nats(model, one) for one in inside) / sum(one.n_learned for one in inside)
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert float(row["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    assert float(row["grad_norm"]) == pytest.approx(torch.cat(grads).norm().item(), rel=1e-4)


def test_a_long_conversation_has_the_loss_of_the_whole(write_chats, model):
    """Through six rows of two lanes, each segment from the state of the one before."""
    records = [
        [
            turn("user", f"{n}"),
            turn("assistant", f"{n} " * 110),
            turn("user", "?"),
            turn("assistant", "!" * 99),
        ]
        for n in range(2)
    ]
    changes = {"trainer.max_steps": 6, "trainer.global_batch_size": 2, "trainer.micro_batch_size": 2}
    task = open_finetuning_task(write_chats(records, changes))
    objective = NextTokenLoss()
    batches = steps_of(task)
    assert batches[0].carry is not None
    with torch.no_grad():
        found = sum(float(objective(model, batch, 0.0).loss) for batch in batches)
        whole = sum(float(nats(model, one)) for one in task.samples.datasets[0])
    assert found == pytest.approx(whole, rel=1e-6)
    assert not objective.carried()  # nothing is left of what has been read


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_in_which_nothing_is_learned_changes_nothing_but_by_weight_decay(
    write_chats, base, method, weight_decay
):
    records = [[turn("user", "abc " * 50), turn("assistant", "yes")]]
    changes = {"trainer.max_steps": 2, "trainer.global_batch_size": 1, "trainer.micro_batch_size": 1}
    changes |= {"optim.weight_decay": weight_decay, "finetune": {"method": method}}
    config = write_chats(records, changes)
    assert all((batch.targets == -100).all() for batch in steps_of(open_finetuning_task(config)))
    summary = run_finetuning(config)

    assert [float(row["loss"]) for row in metrics(summary.out_dir)] == [0.0, 0.0]
    found = load_training_checkpoint(summary.checkpoint).weights
    if method == "lora":
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert not any(tensor.any() for name, tensor in found.items() if "lora_B" in name)
        return
    before = read_weights(base).tensors
    rates = [config.optim.lr * (0.01 + 0.99 * step / 2) for step in range(2)]
    kept = (1 - rates[0] * weight_decay) * (1 - rates[1] * weight_decay)
    for name, tensor in found.items():
        decays = name.endswith(".weight") and ".ln" not in name and not name.startswith("ln")
        torch.testing.assert_close(tensor, before[name] * (kept if decays else 1.0), rtol=1e-6, atol=0)


def names_of(groups, decays):
    return {name for group in groups if group["has_weight_decay"] == decays for name in group["names"]}


@pytest.mark.parametrize(
    ("variant", "decaying", "others"),
    [
        ("lora", {"lora_A.default.weight", "lora_B.default.weight"}, set()),
        (
            "dora",
            {"lora_A.default.weight", "lora_B.default.weight"},
            {"lora_magnitude_vector.default.weight"},
        ),
    ],
)
def test_matrices_of_adapters_decay_and_lengths_do_not(model, variant, decaying, others):
    inject_adapter(model, LoraMethod(method="lora", rank=2, variant=variant), seed=0)
    groups = parameter_groups(model, "rwkv7", OptimConfig())
    for decays, wanted in ((True, decaying), (False, others)):
        assert {name.split(".", 4)[4] for name in names_of(groups, decays)} == wanted


@pytest.mark.parametrize("learn", ["state", "prefix"])
def test_starts_do_not_decay(model, learn):
    if learn == "state":
        learn_state(model)
    else:
        learn_prefix(model, PrefixMethod(method="prefix", n_tokens=2), lambda text: [1], 0)
    groups = parameter_groups(model, "rwkv7", OptimConfig())
    assert not names_of(groups, True)
    wanted = {"start.layers.0.wkv", "start.layers.1.wkv"} if learn == "state" else {"start.embeddings"}
    assert names_of(groups, False) == wanted


def test_factors_of_learning_rates_reach_the_optimizer(chat_settings, monkeypatch):
    seen = {}
    original = run.TrainingModule.on_train_batch_start

    def note(self, batch, batch_idx):
        original(self, batch, batch_idx)
        for group in self.trainer.optimizers[0].param_groups:
            seen.update(
                {name: group["lr"] / self.learning_rate_of(self.completed_steps) for name in group["names"]}
            )

    monkeypatch.setattr(run.TrainingModule, "on_train_batch_start", note)
    factors = {"*.lora_B.*": 16.0, "blocks.1.*.lora_B.*": 2.0}
    run_finetuning(
        chat_settings({"finetune": {"method": "lora", "lr_factors": factors}, "trainer.max_steps": 1})
    )
    assert seen["blocks.0.att.key.lora_A.default.weight"] == pytest.approx(1)
    assert seen["blocks.0.att.key.lora_B.default.weight"] == pytest.approx(16)
    assert seen["blocks.1.ffn.value.lora_B.default.weight"] == pytest.approx(2)
