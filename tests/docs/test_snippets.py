"""Every command and snippet of README and docs parses, and all but the marked ones run, in the order of their page."""

import ast
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from sandbox import FIRST, make_room, shortened
from snippets import LANGUAGES, PAGES, ROOT, blocks, sparse_ft_words

import sparse_ft
from sparse_ft.cli.main import app
from sparse_ft.config import load_config
from sparse_ft.prediction.rules import load_rules
from sparse_ft.tasks.spec import load_task

ALL = blocks()
COMMANDS = typer.main.get_command(app).commands
RUNNING = [
    page for page in PAGES if any(b.page == page and not b.reason and b.language in {"bash", "python"} for b in ALL)
]


@pytest.fixture(scope="module")
def done():
    """Commands that ran already and need not run again; what they wrote is still there."""
    return [shortened(words) for words in FIRST]


def of(*languages):
    return [pytest.param(block, id=block.where) for block in ALL if block.language in languages]


def test_every_fence_is_found_and_says_what_it_holds():
    for page in PAGES:
        fences = len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert fences == 2 * sum(block.page == page for block in ALL), page
    assert {block.language for block in ALL} <= LANGUAGES
    assert len(ALL) > 50


@pytest.mark.parametrize("block", of("bash"))
def test_the_options_of_every_command_exist(block):
    for command in block.commands:
        words = sparse_ft_words(command)
        if words is None:
            assert block.reason, f"{block.where}: {command} is not run by a test, so the block needs a marker"
            scripts = [word for word in command if word.endswith(".py")]
            assert all((ROOT / script).is_file() for script in scripts), scripts
        else:
            COMMANDS[words[0]].make_context(words[0], words[1:])  # raises what a user would see


@pytest.mark.parametrize("block", of("yaml"))
def test_every_yaml_block_is_a_task_rules_or_a_config(block, tmp_path):
    path = tmp_path / "block.yaml"
    path.write_text(block.text, encoding="utf-8")
    content = yaml.safe_load(block.text)
    if isinstance(content, list):
        assert load_rules(path)
    elif "kind" in content:
        assert load_task(path).name == content["name"]
    else:
        load_config(path)


@pytest.mark.parametrize("block", of("json"))
def test_every_json_block_is_json(block):
    assert isinstance(json.loads(block.text), dict)


@pytest.mark.parametrize("block", of("python"))
def test_python_blocks_call_what_exists(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sparse_ft."):
            called = getattr(sparse_ft, ast.unparse(node.func).removeprefix("sparse_ft."))
            known = set(inspect.signature(called).parameters)
            assert {keyword.arg for keyword in node.keywords} <= known, block.where


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_runs_from_top_to_bottom(page, sandbox, done, short_training, monkeypatch, capsys):
    monkeypatch.chdir(sandbox)
    texts = [f"It was {word} {number}." for number in range(8) for word in ("good", "bad")]
    names = {"BACKBONE": "my_backbone", "texts": texts, "labels": ["good", "bad"] * 8}
    for block in (block for block in ALL if block.page == page and not block.reason):
        if block.language == "yaml" and "support_queue" in block.text:
            (sandbox / "support_queue.yaml").write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, block.where, "exec"), names)
        elif block.language == "bash":
            for command in block.commands:
                if command[0] == "cat":
                    monkeypatch.setattr(sys, "stdin", (sandbox / command[1]).open(encoding="utf-8"))
                words = shortened(sparse_ft_words(command))
                if words not in done:
                    make_room(words)
                    app(args=words, prog_name="sparse-ft", standalone_mode=False)
                done.append(words)


def test_the_scores_that_are_shown_have_the_keys_that_are_written(sandbox, monkeypatch):
    monkeypatch.chdir(sandbox)
    app(args=["evaluate", "runs/all", "--task", "ner", "--route", "gate", "--json", "s.json"], standalone_mode=False)
    written = json.loads(Path("s.json").read_text(encoding="utf-8"))
    (shown,) = (json.loads(block.text) for block in ALL if '"confusion"' in block.text)
    rows = (ROOT / "tasks/data/ner/test.txt").read_text(encoding="utf-8").count("\n\n") + 1
    assert shown["tasks"]["ner"]["n"] == sum(shown["routing"]["confusion"]["ner"].values()) == rows
    assert shown.keys() == written.keys()
    assert {key: depth(value) for key, value in shown["routing"].items()} == {
        key: depth(value) for key, value in written["routing"].items()
    }
    assert shown["tasks"]["ner"]["metrics"].keys() <= written["tasks"]["ner"]["metrics"].keys()
    assert shown["tasks"]["ner"]["report"].keys() <= written["tasks"]["ner"]["report"].keys()


def depth(value: object) -> int:
    """Return how many mappings lie in one another."""
    return 1 + max(map(depth, value.values()), default=0) if isinstance(value, dict) else 0
