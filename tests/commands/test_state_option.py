"""``--state``: texts, documents and conversations that start from a state out of a file."""

import json

import pytest
import torch
from typer.testing import CliRunner

from rwkv_train.checkpoints import load_model
from rwkv_train.checkpoints.states import save_official_state
from rwkv_train.config.model import Rwkv7Config
from rwkv_train.models.registry import build_model
from rwkv_train.models.state import save_state
from rwkv_train.tokenizers import load_tokenizer

BEFORE = "It was a dark and stormy night; "
TOKENIZER = load_tokenizer("bytes")


@pytest.fixture
def model(checkpoint):
    return load_model(checkpoint)[0]


@pytest.fixture
def state_file(model, tmp_path):
    """The state after some text."""
    with torch.no_grad():
        state = model(torch.tensor([TOKENIZER.encode(BEFORE)])).state
    save_state(tmp_path / "state.safetensors", state)
    return tmp_path / "state.safetensors"


@pytest.fixture
def official_file(model, tmp_path):
    """A file as state tuning leaves it, of large random numbers."""
    generator = torch.Generator().manual_seed(4)
    state = tuple(
        layer._replace(wkv=100 * torch.randn(layer.wkv.shape, generator=generator))
        for layer in model.zero_state(1)
    )
    save_official_state(tmp_path / "state.pth", state)
    return tmp_path / "state.pth"


@torch.no_grad()
def best_continuation(model, tokens, state, n_tokens):
    """Generate by hand, the whole text anew for each token."""
    start = len(tokens)
    for _ in range(n_tokens):
        logits = model(torch.tensor([tokens]), state).logits[0, -1]
        tokens = [*tokens, int(logits.argmax())]
    return TOKENIZER.decode_bytes(tokens[start:]).decode(errors="replace")


def test_generate_goes_on_from_the_state(call_main, checkpoint, model, official_file):
    tensors = torch.load(official_file, weights_only=True)
    (empty,) = model.zero_state(1)
    state = (empty._replace(wkv=tensors["blocks.0.att.time_state"][None]),)
    tokens = [TOKENIZER.end_of_document, *TOKENIZER.encode("q")]
    common = ["generate", "--checkpoint", checkpoint, "--prompt", "q", "--device", "cpu"]
    common += ["--temperature", "0", "--max-tokens", "12"]

    code, text, _ = call_main(*common, "--state", str(official_file))

    assert code == 0
    assert text == best_continuation(model, tokens, state, 12) + "\n"
    assert text != call_main(*common)[1]


def test_eval_ppl_scores_a_document_as_what_follows_the_state(
    call_main, checkpoint, model, state_file, tmp_path
):
    (tmp_path / "text.txt").write_text("it rained.", encoding="utf-8")
    before, after = TOKENIZER.encode(BEFORE + "and "), TOKENIZER.encode("it rained.")
    # The state knows the text up to BEFORE; what is left of it is the last token, which is the prefix.
    known = torch.tensor([TOKENIZER.encode(BEFORE)])
    with torch.no_grad():
        state = model(known).state
        rest = torch.tensor([[before[-1], *after]])
        nats = model(rest[:, :-1], state, rest[:, 1:]).losses.sum().item()
        whole = model(torch.cat([known, rest[:, :-1]], dim=1)).logits.log_softmax(dim=2)
    by_logits = -whole[0, -len(after) :].gather(1, torch.tensor(after)[:, None]).sum().item()
    assert nats == pytest.approx(by_logits, rel=1e-5)

    options = ["--data", str(tmp_path / "text.txt"), "--device", "cpu", "--prefix-token", str(before[-1])]
    options += ["--json", str(tmp_path / "out.json"), "--checkpoint", checkpoint]
    for more, expected in (
        (["--state", str(state_file)], [by_logits]),
        (["--state", str(state_file), "--mode", "stream"], [by_logits]),
        (["--checkpoint", checkpoint, "--state", str(state_file), "--state", "none"], [by_logits, None]),
    ):
        code, out, err = call_main("eval-ppl", *options, *more)
        assert code == 0, err
        results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["checkpoints"]
        assert results[0]["state"] == str(state_file)
        assert results[0]["total"]["nats"] == pytest.approx(by_logits, rel=1e-5)
        assert f"from the state {state_file}" in out.replace("\n", "")
        assert len(results) == len(expected)
    assert results[1]["state"] is None
    assert results[1]["total"]["nats"] != pytest.approx(by_logits, rel=1e-3)


def test_each_conversation_of_a_chat_starts_from_the_state(checkpoint, official_file):
    from rwkv_train.commands import app

    def answers(*options):
        arguments = ["chat", "--checkpoint", checkpoint, "--device", "cpu", "--max-tokens", "8", *options]
        result = CliRunner().invoke(app, arguments, input="Hello\n/reset\nHello\n")
        assert result.exit_code == 0, result.exception
        return [answer.replace("User: ", "") for answer in result.stdout.split("Assistant:")[1:]]

    first, second = answers("--state", str(official_file))
    assert first == second
    assert first != answers()[0]


@pytest.mark.parametrize("command", ["generate", "chat", "eval-ppl"])
def test_a_state_of_other_sizes_is_refused(call_main, checkpoint, tmp_path, command, monkeypatch):
    other = build_model(Rwkv7Config(n_layer=2, n_embd=32, head_size=16, vocab_size=257))
    save_state(tmp_path / "other", other.zero_state(1))
    (tmp_path / "text.txt").write_text("some text", encoding="utf-8")
    options = {"generate": ["--prompt", "a"], "chat": [], "eval-ppl": ["--data", str(tmp_path / "text.txt")]}

    code, _, err = call_main(
        command, "--checkpoint", checkpoint, "--state", str(tmp_path / "other"), *options[command]
    )

    assert code == 2
    shapes = "[1, 32], [1, 2, 16, 16], [1, 32]"
    assert err == (
        f"error: {tmp_path / 'other'} is the state of another model: it has 2 layers of {shapes}; this model's has 1 "
        f"layers of {shapes}\n"
    )


def test_states_that_are_not_as_many_as_the_checkpoints_are_refused(call_main, checkpoint):
    options = ["--data", "builtin", "--state", "a", "--state", "b"]
    code, _, err = call_main("eval-ppl", "--checkpoint", checkpoint, *options)
    assert code == 2
    assert "--state is given 2 times for 1 checkpoints" in err


def test_a_wrong_state_of_a_later_checkpoint_is_refused_before_the_work(call_main, checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("some text", encoding="utf-8")
    options = ["--data", str(tmp_path / "text.txt"), "--state", "none", "--state", str(tmp_path / "no")]
    code, out, err = call_main("eval-ppl", "--checkpoint", checkpoint, "--checkpoint", checkpoint, *options)
    assert (code, out) == (2, "")
    assert "no cannot be read: No such file" in err
