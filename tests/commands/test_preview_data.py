import json

import pytest

PREVIEW = ("preview-data", "--config", "data-example", "--set", "data.tokenizer=bytes")


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    records = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a"},
        {"prompt": "x" * 40, "completion": "[red]y"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def data(path, more=""):
    return (
        "--set",
        f"data.datasets=[{{path: '{path}', format: prompt-completion}}]",
        "--set",
        f"data.{more}" if more else "model.ctx_len=32",
    )


def test_samples_are_printed_with_what_is_learned_and_what_is_left_out(call_main, chats):
    code, out, _ = call_main(*PREVIEW, *data(chats), "--set", "data.bad_records=drop", "--samples", "2")

    assert code == 0
    assert "[end]User: a\n\nAssistant:« b\n\n»«[end]»\n" in out
    assert "« [red]y\n\n»" in out
    assert "left out 1 of 3: cannot be used, such as" in out
    assert f"{chats}, line 2: there is no field 'completion', only 'prompt'" in out
    # "User: a", blank line, "Assistant:", " b", blank line: 23 bytes, and the end is predicted; the other has 67.
    assert "conversations by tokens: up to 32: 1, up to 64: 0, up to 128: 1" in out
    # 68 = 32 + 32 + 4, and 24 beside the 4.
    assert "packed in rows of 32 tokens: 3, 95.8% filled" in out


def test_json_says_the_same(call_main, chats):
    code, out, _ = call_main(
        *PREVIEW, *data(chats), "--set", "data.bad_records=drop", "--samples", "1", "--json"
    )

    preview = json.loads(out)
    (dataset,) = preview["datasets"]
    assert code == 0
    assert [dataset[name] for name in ("n_records", "n_kept", "n_segmented", "n_tokens")] == [
        3,
        2,
        1,
        24 + 68,
    ]
    assert dataset["left_out"] == {"cannot be used": 1}
    (sample,) = preview["samples"]
    assert [span["is_learned"] for span in sample["spans"]] == [False, False, True, True]


def test_the_first_records_can_be_looked_at_alone(call_main, chats):
    code, out, _ = call_main(*PREVIEW, *data(chats), "--records", "1", "--json")
    assert (code, json.loads(out)["datasets"][0]["n_records"]) == (0, 1)


def test_a_record_that_cannot_be_used_ends_with_one_line(call_main, chats):
    code, out, err = call_main(*PREVIEW, *data(chats))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {chats}, line 2: there is no field 'completion'")
    assert err.count("\n") == 1


def test_what_is_held_out_is_read_too(call_main, chats, tmp_path):
    path = tmp_path / "valid.jsonl"
    path.write_text(
        json.dumps({"prompt": "a", "completion": "bcd"}) + "\n" + json.dumps({"prompt": "a"}) + "\n"
    )
    held_out = ("--set", f"data.valid=[{{path: '{path}', format: prompt-completion}}]")
    drop = (*PREVIEW, *data(chats, "bad_records=drop"), *held_out)

    code, out, _ = call_main(*drop)
    assert code == 0
    assert "held out" in out
    assert f"{path}: left out 1 of 2: cannot be used" in out
    preview = json.loads(call_main(*drop, "--json")[1])
    (dataset,) = preview["held_out"]
    assert (dataset["n_kept"], dataset["n_tokens"], dataset["n_learned"]) == (1, 26, 7)
    assert len(preview["datasets"]) == 1
    assert len(preview["samples"]) == 2  # all that there are, each once

    refused = (*PREVIEW, *data(chats), "--records", "1")  # the first record of each is good
    assert call_main(*refused, *held_out)[0] == 0
    code, _, err = call_main(*refused, "--set", "data.valid=[{path: no.jsonl}]")
    assert (code, "no.jsonl: No such file" in err) == (2, True)


def test_control_characters_are_written_out(call_main, chats):
    chats.write_text(json.dumps({"prompt": "a\x1b[2J\x9b1mb", "completion": "c\rd\x07e\x00"}))
    _, out, _ = call_main(*PREVIEW, *data(chats))
    assert "User: a\\x1b[2J\\x9b1mb\n" in out
    assert "« c\\rd\\x07e\\x00\n" in out


def test_a_missing_file_ends_with_one_line(call_main, tmp_path):
    code, _, err = call_main(*PREVIEW, *data(tmp_path / "no.jsonl"))
    assert code == 2
    assert "no.jsonl: No such file or directory" in err


def test_both_answers_of_a_pair_are_shown(call_main, tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [
        {"prompt": "a", "chosen": "b", "rejected": "cd"},
        {"prompt": "a", "chosen": "x" * 40, "rejected": "y"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs = (*PREVIEW, "--set", f"data.datasets=[{{path: '{path}', format: preference}}]")
    pairs = (*pairs, "--set", "model.ctx_len=64", "--set", "data.bad_records=drop", "--samples", "1")
    code, out, _ = call_main(*pairs)

    assert code == 0
    # "User: a", blank line, "Assistant:", " b", blank line: 23 bytes, and the end is predicted; the other has one more.
    assert (
        f"sample 0, chosen: {path}, line 1\n24 tokens, 5 learned\n[end]User: a\n\nAssistant:« b\n\n»" in out
    )
    assert (
        f"sample 0, rejected: {path}, line 1\n25 tokens, 6 learned\n[end]User: a\n\nAssistant:« cd\n\n»"
        in out
    )
    assert "left out 1 of 2: longer than a row, such as" in out
    assert "packed in rows of 64 tokens: 1, 76.6% filled" in out  # 49 of 64

    _, out, _ = call_main(*pairs, "--json")
    assert [sample["side"] for sample in json.loads(out)["samples"]] == ["chosen", "rejected"]
