"""Each format, from the record to tokens and mask, against texts written by hand."""

import numpy as np
import pytest

from rwkv_train.config.instruct import InstructDataConfig
from rwkv_train.data.instruct.reading import read_conversations
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer

CHAT = [("user", "Hi"), ("assistant", "Yo\n\n\nyo "), ("user", " 2?"), ("assistant", "4")]
WRITTEN = "User: Hi\n\nAssistant:< Yo\nyo\n\n>User: 2?\n\nAssistant:< 4\n\n$>"


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


def only(config, tokenizer="bytes"):
    (read,) = read_conversations(config, load_tokenizer(tokenizer))
    (conversation,) = read.samples
    return conversation


def turns(role="role", content="content", names=("user", "assistant")):
    return [{role: names[who == "assistant"], content: said} for who, said in CHAT]


CASES = {
    "messages": ({"messages": turns()}, {"format": "messages"}, WRITTEN),
    "sharegpt": (
        {"conversations": turns("from", "value", ("human", "gpt")), "system": "Be kind."},
        {"format": "sharegpt"},
        "System: Be kind.\n\n" + WRITTEN,
    ),
    "names of its own": (
        {"dialog": turns("who", "said", ("kunde", "bot"))},
        {
            "fields": {"messages": "dialog", "role": "who", "content": "said"},
            "roles": {"kunde": "user", "bot": "assistant"},
        },
        WRITTEN,
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"format": "alpaca"},
        "User: Add.\n1 1\n\nAssistant:< 2\n\n$>",
    ),
    "alpaca without input": (
        {"instruction": "Add.", "input": "", "output": "2"},
        {"format": "alpaca"},
        "User: Add.\n\nAssistant:< 2\n\n$>",
    ),
    "prompt-completion": (
        {"prompt": "1+1", "completion": "é"},
        {"format": "prompt-completion"},
        "User: 1+1\n\nAssistant:< é\n\n$>",
    ),
    "text": ({"text": "just\n\ntext"}, {"format": "text"}, "<just\n\ntext$>"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_record_becomes_the_tokens_and_the_mask_written_by_hand(write_data, case):
    record, dataset, written = CASES[case]
    ids, mask = by_hand(written)

    conversation = only(write_data([record], dataset=dataset))

    assert conversation.tokens.tolist() == ids
    assert conversation.is_learned.tolist() == mask


@pytest.mark.parametrize(
    ("learn", "written"),
    [
        ("all", "<User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n$>"),
        ({"turns": "last"}, "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:< d\n\n$>"),
        ({"turns": "first"}, "User: a\n\nAssistant:< b\n\n>User: c\n\nAssistant: d\n\n$"),
        ({"roles": ["user"]}, "<User: a\n\n>Assistant: b\n\n<User: c\n\n>Assistant: d\n\n$"),
        ({"roles": ["user", "assistant"]}, "<User: a\n\n>Assistant:< b\n\nUser: c\n\n>Assistant:< d\n\n$>"),
    ],
    ids=["all", "last", "first", "user", "user and assistant"],
)
def test_what_is_learned_goes_by_role_and_turn(write_data, learn, written):
    record = {
        "messages": [
            {"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)
        ]
    }
    conversation = only(write_data([record], learn=learn))
    assert (conversation.tokens.tolist(), conversation.is_learned.tolist()) == by_hand(written)


def test_an_empty_answer_may_be_read(write_data):
    messages = [
        {"role": "assistant", "content": "", "learn": False},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "d"},
    ]
    conversation = only(write_data([{"messages": messages}]))
    written = "Assistant: \n\nUser: \n\nAssistant:< d\n\n$>"
    assert (conversation.tokens.tolist(), conversation.is_learned.tolist()) == by_hand(written)


@pytest.mark.parametrize("learn", ["assistant", "all"])
def test_a_message_that_the_record_takes_out_is_not_learned(write_data, learn):
    messages = [
        {"role": "user", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c", "weight": 0},
        {"role": "assistant", "content": "d", "weight": 1},
    ]
    conversation = only(
        write_data([{"messages": messages}], dataset={"fields": {"learn": "weight"}}, learn=learn)
    )
    written = "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:< d\n\n$>"
    assert (conversation.tokens.tolist(), conversation.is_learned.tolist()) == by_hand(written)


def test_the_world_tokenizer_gives_the_published_ids_and_the_targets_of_the_answer(write_data):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b."}]

    inputs, targets = only(write_data([{"messages": messages}]), "world").inputs_and_targets()

    # 24281 "User", 59 ":", 332 " a", 261 a blank line, 5585 41693 "Assistant", 333 " b", 47 "."
    assert inputs.tolist() == [0, 24281, 59, 332, 261, 5585, 41693, 59, 333, 47, 261]
    assert targets.tolist() == [-100] * 7 + [333, 47, 261, 0]


BAD = {
    "unknown role": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        {},
        r"message 1 of 'messages': the role 'narrator' is not known; .*roles: \{'narrator': ROLE\}",
    ),
    "missing field": ({"turns": []}, {}, r"no field 'messages', only 'turns'; .*fields: \{messages: NAME\}"),
    "missing content": (
        {"messages": [{"role": "user"}]},
        {},
        r"message 1 of 'messages': there is no field 'content', only 'role'",
    ),
    "content that is no text": (
        {"messages": [{"role": "user", "content": None}]},
        {},
        "'content' is null; write a text, or .*drop",
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {},
        "message 1 of 'messages': 'content' is a list of parts; write it as one text",
    ),
    "a call of a tool beside the content": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        {},
        "message 1 of 'messages': it has 'tool_calls', which the model would not see; write it into 'content'",
    ),
    "no messages": ({"messages": []}, {}, "'messages' must be a list of messages, found an empty list"),
    "a message that is none": (
        {"messages": ["hi"]},
        {},
        "message 1 of 'messages': wanted an object .* found str",
    ),
    "nothing to learn": (
        {"messages": [{"role": "user", "content": "x"}]},
        {},
        "nothing to learn: it has messages of the role user; .*data.learn",
    ),
    "all taken out": (
        {"messages": [{"role": "assistant", "content": "x", "learn": False}]},
        {},
        "its own marks take them out",
    ),
    "an empty answer": (
        {"prompt": "x", "completion": " \n"},
        {"format": "prompt-completion"},
        "what is to be learned is empty",
    ),
    "an empty answer among others": (
        {"messages": [{"role": "assistant", "content": " "}, {"role": "assistant", "content": "x"}]},
        {},
        "message 1 is an empty answer, which would be learned; .*learn: false",
    ),
    "a mark that is none": (
        {"messages": [{"role": "user", "content": "x", "learn": "yes"}]},
        {},
        "'learn' must be true or false",
    ),
    "a mark of another name": (
        {"messages": [{"role": "assistant", "content": "x", "weight": 0}]},
        {},
        r"message 1 of 'messages': it has 'weight': 0, .* not to be learned; .*fields: \{learn: weight\}, or remove",
    ),
    "a role that the template lacks": (
        {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]},
        {},
        r"the template g1 fails: .*'tool'; map it to user with roles: \{tool: user\}",
    ),
    "an empty text": ({"text": ""}, {"format": "text"}, "'text' is empty"),
    "half a surrogate pair": ({"text": "\ud800"}, {"format": "text"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_record_that_cannot_be_used_is_refused_with_its_line_and_the_fix(write_data, case):
    record, dataset, message = BAD[case]
    config = write_data(
        [CASES["messages"][0] if not dataset else CASES[dataset["format"]][0], record], dataset=dataset
    )
    with pytest.raises(DataError, match=rf"chats\.jsonl, line 2: .*{message}"):
        read_conversations(config, load_tokenizer("bytes"))


def test_what_is_dropped_is_counted_with_its_reason(write_data):
    good = {"prompt": "a", "completion": "b"}
    records = [
        good,
        {"prompt": "a"},
        {"prompt": "a" * 99, "completion": "b"},
        {"prompt": None, "completion": "b"},
        good,
    ]
    config = write_data(records, dataset={"format": "prompt-completion"}, bad_records="drop", max_tokens=99)

    (read,) = read_conversations(config, load_tokenizer("bytes"))

    assert [conversation.where.rpartition(", ")[2] for conversation in read.samples] == [
        "line 1",
        "line 5",
    ]
    assert read.n_records == 5
    assert read.left_out == {"cannot be used": 2, "longer than max_tokens": 1}
    assert [example.rpartition("jsonl, ")[2][:7] for example in read.examples["cannot be used"]] == [
        "line 2:",
        "line 4:",
    ]


def test_a_dataset_of_which_nothing_is_left_is_refused(write_data):
    config = write_data([{"x": 1}], bad_records="drop")
    with pytest.raises(DataError, match=r"nothing is left of .*line 1: there is no field 'messages'"):
        read_conversations(config, load_tokenizer("bytes"))


def test_a_dataset_says_why_nothing_is_left(write_data):
    config = write_data([CASES["messages"][0]], max_tokens=5)
    with pytest.raises(
        DataError, match=r"nothing is left of .*: 1 longer than max_tokens, such as .*line 1: 53 tokens"
    ):
        read_conversations(config, load_tokenizer("bytes"))


NAMED = {
    "input": ("alpaca", {"input": "contxt"}),
    "system": ("sharegpt", {"system": "sys"}),
    "learn": ("messages", {"learn": "wieght"}),
}


@pytest.mark.parametrize("part", NAMED)
def test_a_field_that_no_record_has_is_refused_where_the_settings_name_it(write_data, part):
    record_format, fields = NAMED[part]
    record = CASES[record_format][0]
    dataset = {"format": record_format, "fields": fields}
    tokenizer = load_tokenizer("bytes")
    with pytest.raises(
        DataError, match=f"no record of .*chats.jsonl has '{fields[part]}', .* for '{part}'; correct"
    ):
        read_conversations(write_data([record], dataset=dataset), tokenizer)

    # One record that has it is enough, and of a part of the records nothing is known.
    given = {**record, fields[part]: ""}
    if part == "learn":
        given = {"messages": [{**message, fields[part]: 1} for message in record["messages"]]}
    read_conversations(write_data([record, given], dataset=dataset), tokenizer)
    read_conversations(write_data([record], dataset=dataset), tokenizer, max_records=1)


def test_the_builtin_dataset_has_right_answers_and_other_questions_for_validation():
    asked = {}
    for split in ("train", "valid"):
        data = {"datasets": [{"path": "builtin", "split": split}], "tokenizer": "bytes"}
        (read,) = read_conversations(InstructDataConfig.model_validate(data), load_tokenizer("bytes"))
        texts = [bytes(t - 1 for t in c.tokens if t).decode() for c in read.samples]
        turns = [turn for text in texts for turn in text.split("User: ")[1:]]
        asked[split] = {turn.split("\n\nAssistant: ")[0] for turn in turns}
        for turn in turns:
            question, answer = turn.removesuffix("\n\n").split("\n\nAssistant: ")
            if question.startswith("Swap the words: "):
                assert answer.split() == question.split()[:-3:-1]
        assert all(np.any(c.is_learned) for c in read.samples)
    assert asked["train"]
    assert asked["valid"]
    assert not asked["train"] & asked["valid"]
