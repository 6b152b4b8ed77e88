"""Pairs of answers: each form of a record, against texts written by hand, and what is refused."""

import pytest

from rwkv_train.data.instruct.reading import read_conversations, read_pairs
from rwkv_train.data.instruct.rows import fill_pair_row, pack_pairs
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer

USER, GOOD, BAD = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "assistant", "content": "5"},
)
SYSTEM = {"role": "system", "content": "Be short."}
TEXT = "User: 2+2?\n\nAssistant:< {}\n\n$>"
WITH_SYSTEM = "System: Be short.\n\n" + TEXT
LONGER = (
    "User: Hi\n\nAssistant: Yo\n\nUser: 2+2?\n\nAssistant:< 4\n\n>User: Sure?\n\nAssistant:< Yes\n\n$>",
    "User: Hi\n\nAssistant: Yo\n\nUser: 2+2?\n\nAssistant:< 5\n\n$>",
)
BEFORE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, USER]
AFTER = [GOOD, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]


def by_hand(text):
    """Ids of the byte tokenizer and the mask of a text in which <...> is learned and $ is the end token."""
    ids, mask, is_learned = [0], [False], False
    for byte in text.encode():
        if byte in b"<>":
            is_learned = byte == ord("<")
        else:
            ids.append(0 if byte == ord("$") else byte + 1)
            mask.append(is_learned)
    return ids, mask


def read(config, ctx_len=1024):
    (dataset,) = read_pairs(config, load_tokenizer("bytes"), ctx_len)
    return dataset


CASES = {
    "texts": ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {}, TEXT),
    "texts and a system message": (
        {"prompt": "2+2?", "chosen": "4", "rejected": "5", "system": "Be short."},
        {},
        WITH_SYSTEM,
    ),
    "messages": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, {}, TEXT),
    "whole conversations": (
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {},
        WITH_SYSTEM,
    ),
    "whole conversations after a text": (
        {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {},
        TEXT,
    ),
    "whole conversations that leave out the field's system message": (
        {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD], "system": "Be short."},
        {},
        WITH_SYSTEM,
    ),
    "names of its own": (
        {
            "asked": [{"from": "human", "value": "2+2?"}],
            "good": [{"from": "bot", "value": "4"}],
            "bad": [{"from": "gpt", "value": "5"}],
        },
        {
            "fields": {
                "prompt": "asked",
                "chosen": "good",
                "rejected": "bad",
                "role": "from",
                "content": "value",
            },
            "roles": {"bot": "assistant"},
        },
        TEXT,
    ),
    "several turns, of which one answer has more": (
        {"prompt": BEFORE, "chosen": AFTER, "rejected": [*BEFORE, BAD]},
        {},
        LONGER,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_record_becomes_two_conversations_of_which_the_answers_are_learned(write_data, case):
    record, dataset, text = CASES[case]
    data = read(write_data([record], dataset={"format": "preference", **dataset}))
    (pair,) = data.samples

    texts = (text.format("4"), text.format("5")) if isinstance(text, str) else text
    for side, written in zip((pair.chosen, pair.rejected), texts, strict=True):
        ids, mask = by_hand(written)
        assert side.tokens.tolist() == ids
        assert side.is_learned.tolist() == mask
    assert pair.where.endswith("chats.jsonl, line 1")
    assert pair.n_inputs == sum(len(by_hand(text)[0]) - 1 for text in texts)
    assert pair.n_learned == sum(sum(by_hand(text)[1]) for text in texts)


GIVEN = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
REFUSALS = {
    "no prompt": ({"chosen": "4", "rejected": "5"}, "there is no field 'prompt', only 'chosen', 'rejected'"),
    "no chosen": ({"prompt": "q", "rejected": "5"}, "there is no field 'chosen'"),
    "no rejected": ({"prompt": "q", "chosen": "5"}, "there is no field 'rejected'"),
    "the same answers": ({**GIVEN, "rejected": "4"}, "the chosen answer and the rejected one are the same"),
    "the same once written": (
        {**GIVEN, "rejected": [{"role": "assistant", "content": " 4\n"}]},
        "are the same, so there is nothing to prefer",
    ),
    "an empty answer": ({**GIVEN, "chosen": " \n"}, "'chosen' is an empty answer"),
    "an empty answer between others": (
        {**GIVEN, "rejected": [{"role": "assistant", "content": ""}, USER, BAD]},
        "'rejected' is an empty answer",
    ),
    "an empty prompt": ({**GIVEN, "prompt": ""}, "'prompt' has no message of the user, or an empty one"),
    "a prompt without a user": ({**GIVEN, "prompt": [SYSTEM]}, "'prompt' has no message of the user"),
    "a prompt with an answer": ({**GIVEN, "prompt": [USER, GOOD]}, "'prompt' ends with a message of the assi"),
    "a prompt that is null": ({**GIVEN, "prompt": None}, "'prompt' must be a text or a list of messages, found null"),
    "an answer that is a number": ({**GIVEN, "chosen": 4}, "'chosen' must be a text or a list of messages, found int"),
    "an answer of no messages": ({**GIVEN, "rejected": []}, "'rejected' must be .*, found an empty list"),
    "nothing after the prompt": ({**GIVEN, "chosen": [USER]}, "'chosen' has no answer after the prompt"),
    "another prompt": (
        {**GIVEN, "chosen": [{"role": "user", "content": "3+3?"}, GOOD]},
        "'chosen' begins with a message of the role user, and not as 'prompt' does",
    ),
    "an answer that ends with a question": (
        {**GIVEN, "chosen": [GOOD, USER]},
        "'chosen' ends with a message of the role user; it must end with an answer",
    ),
    "an unknown role": (
        {**GIVEN, "chosen": [{"role": "bot", "content": "4"}]},
        "message 1 of 'chosen': the role 'bot' is not known",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_record_that_is_no_pair_is_refused_with_its_line(write_data, case):
    record, message = REFUSALS[case]
    config = write_data([GIVEN, record], dataset={"format": "preference"})
    with pytest.raises(DataError, match=rf"chats\.jsonl, line 2: .*{message}"):
        read(config)


def template(tmp_path, source):
    path = tmp_path / "template.jinja"
    path.write_text(source)
    return str(path)


def test_a_template_that_writes_other_prompts_before_the_answers_is_refused(write_data, tmp_path):
    # It writes nothing for an answer in brackets, so that the first text that is learned comes after a second question.
    source = "{% for m in messages %}{% if m.content[0] != '[' %}{{ m.content }}{% endif %}{% endfor %}"
    record = {**GIVEN, "chosen": [{"role": "assistant", "content": "[hm]"}, USER, GOOD]}
    config = write_data([record], dataset={"format": "preference"}, template=template(tmp_path, source))
    with pytest.raises(DataError, match="line 1: the template does not write the same prompt before both"):
        read(config)


def test_a_template_that_writes_no_answers_is_refused(write_data, tmp_path):
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    config = write_data([GIVEN], dataset={"format": "preference"}, template=template(tmp_path, source))
    with pytest.raises(DataError, match="line 1: there is nothing to learn"):
        read(config)


def test_what_is_left_out_is_counted_by_reason(write_data):
    records = [
        GIVEN,  # 27 tokens each: 26 bytes are read after the end token
        {"prompt": "2+2?"},
        {**GIVEN, "rejected": "5" * 38},  # 64
        {**GIVEN, "chosen": "4" * 27, "rejected": "5" * 27},  # 53 each
    ]
    config = write_data(records, dataset={"format": "preference"}, max_tokens=60, bad_records="drop")
    data = read(config, ctx_len=100)

    assert [pair.where.rpartition(" ")[2] for pair in data.samples] == ["1"]
    assert data.left_out == {"cannot be used": 1, "longer than max_tokens": 1, "longer than a row": 1}
    assert data.n_records == 4
    assert data.examples["longer than max_tokens"][0].endswith("line 3: 64 tokens")
    assert "have 106 tokens, and both must stand in one row of 100" in data.examples["longer than a row"][0]


def test_a_pair_counts_once_if_one_of_its_texts_would_be_cut_otherwise(write_data, tmp_path):
    # "G" and "o" are one token of the World tokenizer, "G" and "z" are two.
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    records = [
        {"prompt": "G", "chosen": "o", "rejected": "z"},
        {"prompt": "G", "chosen": "z", "rejected": "zz"},
    ]
    config = write_data(records, dataset={"format": "preference"}, template=template(tmp_path, source))
    (data,) = read_pairs(config, load_tokenizer("world"), 64, compare_whole=True)
    assert data.n_cut_otherwise == 1


def test_a_pair_longer_than_a_row_is_refused_unless_it_is_dropped(write_data):
    config = write_data([GIVEN], dataset={"format": "preference"})
    assert read(config, ctx_len=54).samples[0].n_inputs == 54
    with pytest.raises(DataError, match=r"line 1: its two conversations have 54 tokens.* set model\.ctx_len"):
        read(config, ctx_len=53)


def test_conversations_and_pairs_are_read_by_their_own_function(write_data):
    tokenizer = load_tokenizer("bytes")
    with pytest.raises(ValueError, match="read_pairs reads them"):
        read_conversations(write_data([GIVEN], dataset={"format": "preference"}), tokenizer)
    with pytest.raises(ValueError, match="read_conversations reads them"):
        read_pairs(write_data([{"messages": [USER, GOOD]}]), tokenizer, 64)


def test_whole_pairs_stand_in_few_rows():
    rows = pack_pairs([6, 3, 7, 4], 10)  # by hand: 6 + 4, 7 + 3
    assert sorted(map(sorted, rows)) == [[0, 3], [1, 2]]
    with pytest.raises(ValueError, match="a pair of 11 tokens does not stand in a row of 10"):
        pack_pairs([11], 10)


def test_a_row_has_the_chosen_conversation_of_a_pair_and_then_the_rejected_one(write_data):
    records = [{**GIVEN, "rejected": "no"}, {**GIVEN, "chosen": "four"}]
    pairs = read(write_data(records, dataset={"format": "preference"})).samples
    row = fill_pair_row([pairs[1], pairs[0]], 120)

    starts = [0]
    for sequence, text in enumerate(("four", "5", "4", "no")):
        ids, mask = by_hand(TEXT.format(text))
        starts.append(starts[-1] + len(ids) - 1)
        here = slice(starts[sequence], starts[sequence + 1])
        assert row.tokens[here].tolist() == ids[:-1]
        assert row.targets[here].tolist() == [
            token if learned else -100 for token, learned in zip(ids[1:], mask[1:], strict=True)
        ]
    assert row.cu_seqlens.tolist() == [*starts, 120]
    assert row.tokens[starts[-1] :].tolist() == [0] * (120 - starts[-1])
    assert row.targets[starts[-1] :].tolist() == [-100] * (120 - starts[-1])
    assert (row.chosen.tolist(), row.rejected.tolist()) == ([0, 2], [1, 3])


def right_answer(question):
    kind, _, words = question.partition(": ")
    if kind == "Swap the words":
        return " ".join(reversed(words.split()))
    if kind == "Write in capitals":
        return words.upper()
    if kind == "Spell these words":
        return "\n".join("-".join(word) for word in words.split(", "))
    first, second = question.removeprefix("Which comes first in the alphabet, ").rstrip("?").split(" or ")
    return sorted([first, second])[0]


def test_the_builtin_pairs_prefer_the_right_answer_and_ask_other_questions_for_validation(write_data):
    asked = {}
    for split in ("train", "valid"):
        config = write_data([]).model_validate(
            {
                "datasets": [{"path": "builtin", "format": "preference", "split": split}],
                "tokenizer": "bytes",
            }
        )
        pairs = read(config).samples
        asked[split] = set()
        for pair in pairs:
            chosen, rejected = (
                bytes(t - 1 for t in side.tokens if t).decode().split("User: ")
                for side in (pair.chosen, pair.rejected)
            )
            assert chosen[:-1] == rejected[:-1]
            for turn in chosen[1:]:
                question, answer = turn.removesuffix("\n\n").split("\n\nAssistant: ")
                assert answer == right_answer(question)
                asked[split].add(question)
            question, answer = rejected[-1].removesuffix("\n\n").split("\n\nAssistant: ")
            assert answer != right_answer(question)
    assert (len(asked["train"]) > 500, len(asked["valid"]) > 50) == (True, True)
    assert not asked["train"] & asked["valid"]


def test_the_builtin_pairs_have_the_splits_of_the_builtin_conversations(write_data):
    datasets = [{"path": "builtin", "format": "preference", "split": "test"}]
    config = write_data([]).model_validate({"datasets": datasets})
    with pytest.raises(DataError, match="the built-in dataset has no split 'test'; it has train, valid"):
        read(config)
