import gc
from itertools import islice

import pytest
import torch

from rwkv_train.errors import ConfigError, DataError
from rwkv_train.generation.generate import PROMPT_CHUNK, generate, read_tokens
from rwkv_train.generation.sampling import SamplingSettings

GREEDY = SamplingSettings(temperature=0.0)
FREE = SamplingSettings(temperature=1.0, top_p=1.0)

# Float32 sums in another order, relative to values around 1.
ROUNDING = 2e-5


def start(model, tokenizer, prompt="", settings=GREEDY, *, max_tokens=1000, **options):
    return generate(model, tokenizer, prompt, settings, max_tokens=max_tokens, seed=0, **options)


def text_read(generation, tokenizer):
    """What a scripted model has read, without the end-of-document tokens."""
    return tokenizer.decode_bytes(generation.state[0].wkv[0].tolist()).decode()


def write_letters_only(model):
    """Keep every other token from being chosen: no end of document, nothing to hold back."""
    with torch.no_grad():
        model.ln_out.bias[0] = 10
        model.head.weight[:, 0] = -10
        model.head.weight[1 + ord("a") : 1 + ord("z") + 1, 0] = 10


def test_greedy_text_is_that_of_reading_everything_again_for_each_token(model, tokenizer):
    prompt = "To be"
    tokens = [tokenizer.end_of_document, *tokenizer.encode(prompt)]
    n_prompt = len(tokens)
    for _ in range(12):
        logits = model(torch.tensor([tokens])).logits[0, -1, : tokenizer.vocab_size]
        if logits.argmax() == tokenizer.end_of_document:
            break
        tokens.append(int(logits.argmax()))
    assert len(tokens) > n_prompt + 5
    expected = tokenizer.decode_bytes(tokens[n_prompt:]).decode(errors="replace")

    assert "".join(start(model, tokenizer, prompt, max_tokens=12)) == expected


def test_a_seed_gives_the_same_text_again_and_another_seed_another(model, tokenizer):
    def text(seed):
        return "".join(generate(model, tokenizer, "a", FREE, max_tokens=30, seed=seed))

    assert text(3) == text(3)
    assert text(3) != text(4)


def test_a_long_prompt_is_read_in_chunks(model, tokenizer):
    tokens = tokenizer.encode("0123456789" * 110)
    lengths = []
    model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    logits, state = read_tokens(model, tokens, model.zero_state(1))
    assert lengths == [PROMPT_CHUNK, PROMPT_CHUNK, 1100 - 2 * PROMPT_CHUNK]

    whole = model(torch.tensor([tokens]))
    torch.testing.assert_close(logits, whole.logits[0, -1], rtol=ROUNDING, atol=ROUNDING)
    for layer, expected in zip(state, whole.state, strict=True):
        torch.testing.assert_close(tuple(layer), tuple(expected), rtol=ROUNDING, atol=ROUNDING)


def test_memory_does_not_grow_with_the_text(model, tokenizer):
    write_letters_only(model)

    def live_bytes():
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return len(tensors), sum(x.numel() * x.element_size() for x in tensors)

    generation = start(model, tokenizer, "x", FREE, max_tokens=1000, stop=["\n\nUser:"])
    assert len(list(islice(generation, 20))) == 20
    early = live_bytes()
    assert len(list(islice(generation, 100))) == 100
    assert live_bytes() == early


def test_the_text_ends_with_the_document(scripted, tokenizer):
    generation = start(scripted("the end"), tokenizer)
    assert "".join(generation) == "the end"
    assert generation.finish_reason == "end_of_document"
    assert generation.n_tokens == len("the end")


def test_the_text_ends_after_max_tokens(scripted, tokenizer):
    model = scripted("never ending")
    generation = start(model, tokenizer, max_tokens=5)
    assert "".join(generation) == "never"
    assert generation.finish_reason == "max_tokens"
    assert len(model.lengths_read) == 5  # the prompt, and each token but the last, which nothing follows


def test_no_tokens_at_all_only_read_the_prompt(scripted, tokenizer):
    generation = start(scripted("x"), tokenizer, "prompt", max_tokens=0)
    assert list(generation) == []
    assert text_read(generation, tokenizer) == "prompt"


@pytest.mark.parametrize("stop", [["END"], ["nothing", "ENDLESS", "END"]])
def test_the_text_ends_before_a_stop_string_that_arrives_byte_by_byte(scripted, tokenizer, stop):
    generation = start(scripted("so E it ENDs here"), tokenizer, stop=stop)
    assert "".join(generation) == "so E it "
    assert generation.finish_reason == "stop"


def test_the_beginning_of_a_stop_string_at_the_very_end_is_text(scripted, tokenizer):
    assert "".join(start(scripted("so E"), tokenizer, stop=["END"])) == "so E"


def test_pieces_are_whole_characters(scripted, tokenizer):
    text = "Łódź 東京 🦢"
    assert list(start(scripted(text), tokenizer)) == list(text)


def test_bytes_that_are_no_character_are_replaced_also_at_the_end(scripted, tokenizer):
    assert "".join(start(scripted(b"a\xffb\xe6\x9d"), tokenizer)) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("n_pieces", range(25))
def test_state_and_unread_text_are_everything_at_any_interruption(scripted, tokenizer, n_pieces):
    text = "Zoë says:\n\nUsually\n\n\nUser: no"
    generation = start(scripted(text), tokenizer, "Prompt.", stop=["\n\nUser:"])
    shown = "".join(islice(generation, n_pieces))
    assert text.startswith(shown)
    if shown:
        assert text_read(generation, tokenizer) + generation.unread == "Prompt." + shown
        assert "\n\nUser:" not in text_read(generation, tokenizer)


def test_an_interruption_before_the_first_piece_leaves_the_prompt_unread(scripted, tokenizer):
    generation = start(scripted("x"), tokenizer, "Prompt.")
    assert text_read(generation, tokenizer) + generation.unread == "Prompt."


def test_a_text_goes_on_from_its_state_as_if_it_had_not_been_cut(model, tokenizer):
    write_letters_only(model)
    whole = "".join(start(model, tokenizer, "Once", max_tokens=40))
    first = start(model, tokenizer, "Once", max_tokens=15)
    beginning = "".join(first)
    rest = start(model, tokenizer, first.unread, max_tokens=25, state=first.state)

    assert len(whole) == 40
    assert beginning + "".join(rest) == whole


def test_a_new_text_begins_with_the_end_of_a_document(scripted, tokenizer):
    generation = start(scripted("x"), tokenizer, "ab", max_tokens=0)
    list(generation)
    assert generation.state[0].wkv.tolist() == [[tokenizer.end_of_document, 98, 99]]


def test_ids_that_only_the_model_has_are_never_chosen(scripted, tokenizer):
    model = scripted("A", vocab_size=300)
    model.script = [299]  # beyond the tokenizer's 257; all that remain are equal, and the lowest is chosen
    generation = start(model, tokenizer)
    assert "".join(generation) == ""
    assert generation.finish_reason == "end_of_document"


def test_penalties_keep_a_model_from_repeating_itself(scripted, tokenizer):
    repeating = scripted("aaaaaaaaaa")
    free = "".join(start(repeating, tokenizer, max_tokens=6))
    settings = SamplingSettings(temperature=0.0, frequency_penalty=0.4, penalty_decay=1.0)
    penalized = start(scripted("aaaaaaaaaa"), tokenizer, settings=settings, max_tokens=6)
    # "a" has logit 1 and loses 0.4 each time, so it leads until the fourth choice; then id 0 ends the text.
    assert free == "aaaaaa"
    assert "".join(penalized) == "aaa"


def test_a_prompt_of_another_tokenizer_is_refused(scripted, tokenizer):
    with pytest.raises(DataError, match="token 123 of the text is beyond the model's vocabulary of 100"):
        list(start(scripted("x", vocab_size=100), tokenizer, "z"))


def test_a_negative_length_is_refused(scripted, tokenizer):
    with pytest.raises(ConfigError, match="max_tokens is -1; it must be 0 or more"):
        start(scripted("x"), tokenizer, max_tokens=-1)


def test_a_state_without_text_to_read_is_refused(scripted, tokenizer):
    model = scripted("x")
    with pytest.raises(ValueError, match="must have text"):
        start(model, tokenizer, "", state=model.zero_state(1))
