"""What the README, the docs and the Makefile tell people to type is there and works."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import zstandard

from rwkv_train.commands import app
from tests import forks

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *(CHECKOUT / "docs").glob("*.md")])
SMALL = {
    "model.n_layer": 1,
    "model.n_embd": 64,
    "model.ctx_len": 16,
    "model.lora_ranks": "{w: 8, a: 8, v: 8, g: 8}",
    "trainer.accelerator": "cpu",
    "trainer.precision": "fp32",
    "trainer.max_steps": 1,
    "trainer.global_batch_size": 6,
    "trainer.sample_tokens": 1,
}


def commands_of(text):
    """Lines of code blocks that start with the command; a line that ends in a backslash goes on."""
    blocks = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    lines = [line.strip() for line in blocks.splitlines()]
    return [line for line in lines if line.startswith("rwkv-train ") and "[" not in line]  # no synopses


def commands_of_the_makefile():
    text = (CHECKOUT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ").replace("$(DEMO)", "demo")
    return [
        line.replace("$(RWKV)", "rwkv-train").strip() for line in text.splitlines() if "\t$(RWKV)" in line
    ]


TOLD = sorted({line for page in PAGES for line in commands_of(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("line", [*TOLD, *commands_of_the_makefile()])
def test_every_command_that_is_told_can_be_parsed(line):
    _, name, *arguments = shlex.split(line, comments=True)
    root = typer.main.get_command(app)
    with root.make_context("rwkv-train", [name, *arguments]) as context:
        _, command, rest = root.resolve_command(context, [name, *arguments])
        command.make_context(name, rest, parent=context)  # raises on an option or a value that is not there


def test_the_two_commands_of_the_readme_are_targets_of_make():
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "make test" in (CHECKOUT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_commands_of_the_readme_work_one_after_the_other(tmp_path, monkeypatch):
    texts = [f"Document {i} has number {i}. " * 20 for i in range(100, 500)]  # all of one length
    lines = "\n".join(json.dumps({"text": text, "meta": {"pile_set_name": "a"}}) for text in texts)
    (tmp_path / "my-texts").mkdir()
    (tmp_path / "my-texts" / "some.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))

    turns = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant")]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 50)
    (tmp_path / "chats.yaml").write_text(
        re.search(r"```yaml\n(model: {init_from.*?)```", README, re.DOTALL)[1]
    )

    monkeypatch.chdir(tmp_path)
    for line in commands_of(README):
        arguments = shlex.split(line, comments=True)[1:]
        if arguments[0] == "pretrain":
            arguments += [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
        if arguments[0] == "finetune":
            arguments += ["--set", "trainer.max_steps=1", "--set", "model.ctx_len=16"]
        process = forks.start([CHECKOUT / "cli.py", *arguments], tmp_path / "log.txt")
        process.join()
        assert process.exitcode == 0, f"{line}\n{(tmp_path / 'log.txt').read_text()}"

    total = json.loads((tmp_path / "perplexity.json").read_text())["checkpoints"][0]["total"]
    assert 0 < total["documents"] < 40  # one in a hundred is held out
    assert total["bytes"] == total["documents"] * len(texts[0])
    assert (tmp_path / "merged.pth").is_file()
