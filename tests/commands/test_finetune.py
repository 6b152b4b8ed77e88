"""``rwkv-train finetune --dry-run``: what it prints, and how it ends."""

import json

import pytest
import yaml


@pytest.fixture
def config(checkpoint, tmp_path):
    """The path of settings that finetune the small RWKV-7 on three chats."""
    chat = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "xyz"}]}
    (tmp_path / "chats.jsonl").write_text(3 * (json.dumps(chat) + "\n"))
    tree = {
        "model": {"init_from": checkpoint, "ctx_len": 32},
        "data": {"datasets": [{"path": str(tmp_path / "chats.jsonl")}], "tokenizer": "bytes"},
        "finetune": {"method": "state"},
        "trainer": {
            "out_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "global_batch_size": 2,
            "micro_batch_size": 1,
            "accelerator": "cpu",
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_a_dry_run_prints_settings_and_plan_and_writes_nothing(call_main, config, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, out, err = call_main("finetune", "--config", config, "--dry-run")
    assert code == 0
    assert "error" not in err
    settings, _, table = out.partition("\nplan ")
    assert yaml.safe_load(settings)["model"]["n_embd"] == 32
    rows = {
        name.strip(): value.strip()
        for _, name, value, _ in (line.split("│") for line in table.splitlines() if line.count("│") == 3)
    }
    assert rows["parameters that learn"].startswith(f"{32 * 16:,} (")  # a state of 32 x 16 in the one layer
    assert rows["steps"].startswith("3")
    assert rows["rows an epoch"] == "3 of 32 tokens, 84.4% filled"  # 27 of 32
    assert rows["time (estimate)"].startswith("about ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_prints_every_problem_on_a_line_and_ends_with_2(call_main, config):
    code, out, err = call_main(
        *("finetune", "--config", config, "--dry-run"),
        *("--set", "trainer.wkv_backend=foo"),
        *("--set", "data.template=nowhere.jinja"),
        *("--set", "finetune={method: freeze, train: [heads.*]}"),
    )
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)
    for part in ("nowhere.jinja", "there is no backend 'foo'", "heads.*"):
        assert sum(part in line for line in lines) == 1


def test_a_dry_run_names_every_setting_that_is_wrong(call_main, config):
    code, out, err = call_main(
        *("finetune", "--config", config, "--dry-run"),
        *("--set", "trainer.seed=x", "--set", "optim.lrr=1", "--set", "data.learn=some"),
    )
    assert code == 2
    assert out == ""
    for part in ("trainer.seed is 'x'", "optim.lrr: no such setting", "data.learn"):
        assert part in err
