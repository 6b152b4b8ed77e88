import pytest
import torch

from rwkv_train.errors import ConfigError
from rwkv_train.generation.generate import generate
from rwkv_train.generation.sampling import SamplingSettings
from rwkv_train.generation.side_by_side import Prompt, generate_side_by_side

GREEDY = SamplingSettings(temperature=0.0)
FREE = SamplingSettings(temperature=1.0, top_p=1.0)
ONE_VERSION = pytest.mark.parametrize("model", ["rwkv7"], indirect=True)
TEXTS = ["To be", "", "x" * 20, "Grüße 🦢", "once more", "last"]


def prompts(tokenizer, settings=GREEDY, **options):
    return [
        Prompt([tokenizer.end_of_document, *tokenizer.encode(text)], settings, 6 + 2 * i, seed=i, **options)
        for i, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("model", ["rwkv4", "rwkv7"], indirect=True)
@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize("settings", [GREEDY, FREE], ids=["greedy", "sampled"])
def test_each_text_is_the_one_its_prompt_gets_alone(model, tokenizer, settings, batch_size):
    model = model.double()  # rounding differs with the number of rows, and must not decide here
    found = dict(generate_side_by_side(model, tokenizer, prompts(tokenizer, settings), batch_size=batch_size))
    expected = {
        i: "".join(generate(model, tokenizer, text, settings, max_tokens=6 + 2 * i, seed=i))
        for i, text in enumerate(TEXTS)
    }
    assert found == expected


@ONE_VERSION
def test_a_text_ends_exactly_before_its_stop_string(model, tokenizer):
    free = dict(generate_side_by_side(model, tokenizer, prompts(tokenizer), batch_size=3))
    stop = free[5][4:6]
    assert len(stop) == 2
    stopped = dict(generate_side_by_side(model, tokenizer, prompts(tokenizer, stop=(stop,)), batch_size=3))
    assert stopped == {i: text.partition(stop)[0] for i, text in free.items()}


@ONE_VERSION
def test_a_free_row_is_taken_by_the_next_prompt(model, tokenizer):
    rows = []
    model.register_forward_pre_hook(
        lambda _, arguments: rows.append(arguments[0].shape[0]) if arguments[0].shape[1] == 1 else None
    )
    short, long = Prompt([0, 5], GREEDY, 2), Prompt([0, 6], GREEDY, 8)
    with torch.no_grad():
        model.head.weight[0] = 0  # the end of a document, which would free rows earlier
        model.ln_out.bias[0] = 10
        model.head.weight[1:257, 0] = 10
    done = [index for index, _ in generate_side_by_side(model, tokenizer, [long, short, short], batch_size=2)]
    assert done == [1, 2, 0]
    # The first token comes with the prompt: the long text needs 7 steps, each short one 1.
    assert rows == [2, 2, 1, 1, 1, 1, 1]


@ONE_VERSION
def test_no_rows_at_all_are_refused(model, tokenizer):
    with pytest.raises(ConfigError, match="batch_size is 0; it must be at least 1"):
        list(generate_side_by_side(model, tokenizer, [], batch_size=0))
