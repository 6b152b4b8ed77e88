"""What a finetuning run refuses: one sentence with the place and the fix."""

import json
import signal

import pytest
import yaml

from rwkv_train import commands
from rwkv_train.checkpoints import read_weights, write_weights
from rwkv_train.errors import CheckpointError, ConfigError, DataError
from rwkv_train.tokenizers import TokenizerIdentity
from rwkv_train.training.finetuning import run_finetuning

FINE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def refused(chat_settings, tmp_path):
    """Return the sentence that a run on these records gets."""

    def refuse(error, changes=None, records=None):
        if records is not None:
            path = tmp_path / "own.jsonl"
            path.write_text("\n".join(json.dumps({"messages": turns}) for turns in records))
            changes = {"data.datasets": [{"path": str(path)}], **(changes or {})}
        with pytest.raises(error) as caught:
            run_finetuning(chat_settings(changes))
        sentence = str(caught.value)
        assert "\n" not in sentence
        return sentence

    return refuse


def test_a_role_that_is_not_known(refused):
    sentence = refused(DataError, records=[FINE, [{"role": "robot", "content": "Hi"}, FINE[1]]])
    assert "own.jsonl, line 2: " in sentence
    assert "'robot'" in sentence
    assert "roles" in sentence  # the setting that says what it means


def test_a_sample_with_nothing_to_learn_from(refused):
    sentence = refused(DataError, records=[FINE, FINE, FINE[:1]])
    assert "own.jsonl, line 3: there is nothing to learn" in sentence
    assert "data.bad_records" in sentence


def test_a_mask_that_hides_all(refused):
    learn = {"roles": ["system"]}
    sentence = refused(DataError, {"data.learn": learn}, records=[FINE])
    assert "own.jsonl, line 1: there is nothing to learn" in sentence
    assert "data.learn" in sentence
    sentence = refused(DataError, {"data.learn": learn, "data.bad_records": "drop"}, records=[FINE])
    assert "own.jsonl" in sentence


def test_a_template_that_fails(refused, tmp_path):
    path = tmp_path / "bad.jinja"
    path.write_text("{% for message in messages %}{{ message.content | no_filter }}{% endfor %}")
    assert "bad.jinja" in refused(DataError, {"data.template": str(path)}, records=[FINE])
    path.write_text("{% for message in messages %}{{ message.content + message.absent }}{% endfor %}")
    assert "bad.jinja" in refused(DataError, {"data.template": str(path)}, records=[FINE])


def test_a_base_of_a_smaller_vocabulary(refused, base, tmp_path):
    weights = read_weights(base)
    tensors = {
        name: tensor[:200] if name in ("emb.weight", "head.weight") else tensor
        for name, tensor in weights.tensors.items()
    }
    small = weights._replace(tensors=tensors, config=weights.config.model_copy(update={"vocab_size": 200}))
    path = write_weights(tmp_path / "small.pth", small, "pth")
    sentence = refused(ConfigError, {"model.init_from": str(path), "model.vocab_size": 200})
    assert "data.tokenizer 'bytes' has 257 tokens, more than the 200" in sentence


def test_a_base_of_another_tokenizer(refused, base, tmp_path):
    other = read_weights(base)._replace(tokenizer=TokenizerIdentity("mine", "0" * 64))
    path = write_weights(tmp_path / "other", other, "safetensors")
    sentence = refused(ConfigError, {"model.init_from": str(path)})
    assert (
        "was trained with the tokenizer 'mine', but data.tokenizer is 'bytes'; use the same one" in sentence
    )


def test_a_pattern_that_fits_nothing_that_learns(refused):
    method = {"method": "lora", "lr_factors": {"*.lora_C.*": 2.0}}
    sentence = refused(ConfigError, {"finetune": method})
    assert sentence.startswith(
        "finetune.lr_factors has '*.lora_C.*', which fits no name; there is, for instance,"
    )
    # A parameter of the base is there, but does not learn.
    assert "finetune.lr_factors" in refused(
        ConfigError, {"finetune": {"method": "lora", "lr_factors": {"emb.weight": 2.0}}}
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preference": {"loss": "dpo"}, "optim.l2wrap": 0.0}, "the section preference is set"),
        ({"prompts": ["Hi"]}, "set data.valid or data.valid_fraction"),
        ({"trainer.early_stopping_patience": 2}, "needs held-out data"),
        (
            {"finetune": {"method": "state"}, "trainer.strategy": "fsdp2"},
            "'ddp', 'deepspeed_1' or 'deepspeed_2'",
        ),
        ({"finetune": {"method": "prefix"}, "trainer.strategy": "deepspeed_3"}, "'ddp', 'deepspeed_1' or"),
        (
            {"finetune": {"method": "lora", "quantize": "int8"}, "trainer.strategy": "deepspeed_3"},
            "finetune.quantize to 'none'",
        ),
        ({"finetune": {"method": "lora", "quantize": "nf4", "variant": "dora"}}, "set variant to 'lora'"),
        ({"finetune": {"method": "state", "lr_factors": {}}}, "lr_factors: no such setting"),
        ({"trainer.compile": True, "trainer.wkv_backend": "reference"}, "set the backend to 'auto'"),
        ({"model.init_from": None}, "model.init_from must be set"),
    ],
)
def test_settings_that_contradict_each_other(refused, changes, words):
    assert words in refused(ConfigError, changes)


def test_pairs_need_the_section_preference(refused, chats):
    datasets = [{"path": str(chats / "pairs.jsonl"), "format": "preference"}]
    assert "the section preference is not set" in refused(ConfigError, {"data.datasets": datasets})


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command line; return its exit code and what is on stderr."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # main takes SIGTERM over

    def run_command(*arguments):
        monkeypatch.setattr("sys.argv", ["rwkv-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            commands.main()
        return caught.value.code, capsys.readouterr().err.splitlines()[-1]

    return run_command


def test_a_command_line_gets_exit_code_2_and_one_line(command, chat_tree, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"messages": FINE[:1]}))
    chat_tree["data"]["datasets"] = [{"path": str(bad)}]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(chat_tree))
    code, line = command("finetune", "--config", file)
    assert code == 2
    assert line.startswith(f"error: {bad}, line 1: there is nothing to learn")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("method", "way"), [("lora", "merge it: rwkv-train merge-adapter"), ("state", "--state")]
)
def test_what_was_learned_beside_a_base_is_no_model(command, chat_settings, base, method, way):
    config = chat_settings({"finetune": {"method": method}, "trainer.max_steps": 1})
    folder = run_finetuning(config).checkpoint
    with pytest.raises(CheckpointError, match="holds only what finetuning") as caught:
        read_weights(folder)
    assert way in str(caught.value)
    assert str(base) in str(caught.value)
    code, line = command("generate", "--checkpoint", folder, "--prompt", "Hi", "--device", "cpu")
    assert code == 2
    assert way in line
