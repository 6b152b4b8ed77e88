from itertools import islice

import pytest
import torch

from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.generation.chat import ChatSession
from rwkv_train.generation.sampling import SamplingSettings
from rwkv_train.models.state import save_state

GREEDY = SamplingSettings(temperature=0.0)


def session_of(model, tokenizer):
    return ChatSession(model, tokenizer, GREEDY, max_tokens=50, seed=0)


def conversation(session, tokenizer, path):
    """All that the model has read when the conversation is saved; the model must be a scripted one."""
    session.save(path)
    return tokenizer.decode_bytes(session._state[0].wkv[0].tolist()).decode()


def test_turns_stand_in_the_template_and_in_one_state(scripted, tokenizer, tmp_path):
    model = scripted("")
    session = session_of(model, tokenizer)
    model.script, model.n_answered = [byte + 1 for byte in b" Hello!\n\nUser:"], 0
    assert "".join(session.reply("Hi")) == " Hello!"
    model.script, model.n_answered = [*(byte + 1 for byte in b" Fine."), tokenizer.end_of_document], 0
    assert "".join(session.reply("How are\n\n\nyou?  ")) == " Fine."

    assert conversation(session, tokenizer, tmp_path / "s") == (
        "User: Hi\n\nAssistant: Hello!\n\nUser: How are\nyou?\n\nAssistant: Fine."
    )


def test_an_answer_that_ends_with_the_separator_is_followed_by_no_second_one(scripted, tokenizer, tmp_path):
    model = scripted("")
    session = session_of(model, tokenizer)
    for answer in (b" Hello!\n\n", b" Fine."):
        model.script, model.n_answered = [*(byte + 1 for byte in answer), tokenizer.end_of_document], 0
        list(session.reply("Hi"))

    assert conversation(session, tokenizer, tmp_path / "s") == (
        "User: Hi\n\nAssistant: Hello!\n\nUser: Hi\n\nAssistant: Fine."
    )


def test_an_interrupted_answer_is_remembered_as_far_as_it_was_shown(scripted, tokenizer, tmp_path):
    session = session_of(scripted("_A long answer"), tokenizer)
    reply = session.reply("Hi")
    shown = "".join(islice(reply, 6))
    reply.close()
    assert conversation(session, tokenizer, tmp_path / "s") == "User: Hi\n\nAssistant:" + shown


def test_the_state_has_one_size_for_ever(model, tokenizer):
    session = session_of(model, tokenizer)
    sizes = set()
    for turn in range(6):
        list(session.reply("word " * turn + "?"))
        sizes.add(tuple(x.untyped_storage().nbytes() for layer in session._state for x in layer))
    assert len(sizes) == 1


def test_a_reset_conversation_is_a_new_one(model, tokenizer):
    session = session_of(model, tokenizer)
    first = "".join(session.reply("Hello there"))
    list(session.reply("More"))
    session.reset()
    assert "".join(session.reply("Hello there")) == first


def test_a_loaded_conversation_goes_on_where_it_was_saved(model, tokenizer, tmp_path):
    first = session_of(model, tokenizer)
    list(first.reply("Remember the number 7"))
    first.save(tmp_path / "state.safetensors")
    expected = "".join(first.reply("Which number?"))

    second = session_of(model, tokenizer)
    second.load(tmp_path / "state.safetensors")
    assert "".join(second.reply("Which number?")) == expected


def test_there_is_nothing_to_save_before_the_first_turn(model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no conversation to save yet"):
        session_of(model, tokenizer).save(tmp_path / "state.safetensors")


def test_the_state_of_another_model_is_refused(model, tokenizer, tmp_path):
    state = model.zero_state(1)
    save_state(tmp_path / "short", state[:1])
    session = session_of(model, tokenizer)
    with pytest.raises(CheckpointError, match="is the state of another model: it has 1 layers"):
        session.load(tmp_path / "short")
    wide = tuple(layer._replace(time_mix_x=torch.zeros(1, 64)) for layer in state)
    save_state(tmp_path / "wide", wide)
    with pytest.raises(CheckpointError, match=r"of \[1, 64\].*this model's has 2 layers of \[1, 32\]"):
        session.load(tmp_path / "wide")
