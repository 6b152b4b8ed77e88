import pytest

from rwkv_train.errors import ConfigError
from rwkv_train.evaluation.gen_kwargs import parse_gen_kwargs


@pytest.mark.parametrize(
    ("gen_kwargs", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True}, 1.0),
    ],
    ids=str,
)
def test_the_temperature_follows_the_rules_of_the_harness(gen_kwargs, temperature):
    assert parse_gen_kwargs(gen_kwargs).settings.temperature == temperature


@pytest.mark.parametrize(
    ("until", "stop"), [("\n", ("\n",)), (["a", "", "b"], ("a", "b")), (None, ()), ([], ())], ids=str
)
def test_stop_strings_may_be_one_several_or_none(until, stop):
    assert parse_gen_kwargs({"until": until}).stop == stop


def test_the_length_has_several_names_and_a_default():
    assert parse_gen_kwargs({"max_gen_toks": 5, "max_tokens": 7}).max_tokens == 5
    assert parse_gen_kwargs({"max_new_tokens": 9}).max_tokens == 9
    assert parse_gen_kwargs({}).max_tokens == 256


def test_limits_of_what_is_drawn_from_are_those_of_the_task_alone():
    free = parse_gen_kwargs({"do_sample": True}).settings
    assert (free.top_p, free.top_k) == (1.0, None)
    limited = parse_gen_kwargs({"do_sample": True, "top_p": 0.5, "top_k": 3}).settings
    assert (limited.top_p, limited.top_k) == (0.5, 3)


def test_a_setting_that_would_have_no_effect_is_refused():
    with pytest.raises(ConfigError, match="have 'num_beams', which rwkv-train does not know"):
        parse_gen_kwargs({"until": "x", "num_beams": 4})


@pytest.mark.parametrize(
    ("gen_kwargs", "sentence"),
    [
        ({"max_gen_toks": "many"}, "the task's max_gen_toks is 'many'; it must be a number"),
        ({"max_new_tokens": -1}, "the task's max_new_tokens is -1; it must be at least 0"),
        ({"temperature": []}, "the task's temperature is \\[\\]; it must be a number"),
        ({"top_k": "x"}, "the task's top_k is 'x'; it must be a number"),
        ({"until": 5}, "the task's until is 5; it must be a text or a list of texts"),
        ({"until": ["a", 5]}, "must be a text or a list of texts"),
    ],
    ids=str,
)
def test_a_value_that_means_nothing_is_refused(gen_kwargs, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_gen_kwargs(gen_kwargs)


def test_what_a_task_sets_to_null_is_not_set():
    names = ("temperature", "top_p", "top_k", "max_gen_toks", "until")
    assert parse_gen_kwargs(dict.fromkeys(names)) == parse_gen_kwargs({})
