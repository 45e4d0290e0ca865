"""Every script of examples/, as its first lines say to run it, on a checkpoint that was trained for a moment."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from toys import settings

import sparse_ft
from sparse_ft.tasks.spec import load_task

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*/*.py"))

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the tests run without examples/")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_bert):
    """The four bundled tasks, on a tiny backbone and few rows: it knows nothing, but answers everything."""
    output = tmp_path_factory.mktemp("examples") / "checkpoint"
    sparse_ft.train(
        ["sentiment", "topic", "intent", "ner"],
        output=output,
        backbone=str(tiny_bert),
        overrides=settings(train__epochs=1, data__train_limit=16, experts__word_shapes=False),
        device="cpu",
    )
    return output


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Run a script in an empty folder; return what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments) -> str:
        path = EXAMPLES / name
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_every_script_says_how_it_is_run_and_is_run_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(SCRIPTS) == 7
    for path in SCRIPTS:
        name = path.relative_to(EXAMPLES).as_posix()
        assert f"python examples/{name} --" in path.read_text(encoding="utf-8"), name
        assert f'"{name}"' in source, name
        others = [
            file for file in path.parent.rglob("*") if file.is_file() and file.suffix in {".csv", ".txt", ".yaml"}
        ]
        assert others, f"{name} has no sample input"


def test_customer_service(script, checkpoint):
    names = runpy.run_path(str(EXAMPLES / "customer_service/assistant.py"))
    assert names["REPLIES"].keys() | names["FOR_A_HUMAN"] == set(load_task("intent").labels)
    messages = (EXAMPLES / "customer_service/messages.txt").read_text(encoding="utf-8").splitlines()
    out = script("customer_service/assistant.py", "--checkpoint", checkpoint, "--least", 0)
    answers = sparse_ft.load(checkpoint).predict(messages, "intent")
    human = [answer.tasks["intent"]["label"] in {"oos", "speak_to_human"} for answer in answers]
    assert out.rstrip().endswith(f"{len(messages)} messages, {sum(human)} handed to a human.")
    assert all(message in out for message in messages)


def test_opinion_monitor(script, checkpoint, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    out = script("opinion_monitor/monitor.py", "--checkpoint", checkpoint, "--output", "trend.png", "--jump", 0)
    assert "48 posts read." in out
    assert (tmp_path / "trend.png").read_bytes().startswith(b"\x89PNG")
    find_alerts = runpy.run_path(str(EXAMPLES / "opinion_monitor/monitor.py"))["find_alerts"]
    weeks = {1: [True, False, False, False], 2: [False] * 4, 3: [True, True, True, False], 4: [True, True]}
    assert find_alerts(weeks, jump=0.3, least=3) == [(3, 0.75, 0.125)]
    assert [week for week, _, _ in find_alerts(weeks, jump=0.3, least=2)] == [3, 4]
    assert find_alerts(weeks, jump=0.9, least=1) == []


def test_recommender(script, checkpoint):
    out = script("recommender/recommend.py", "--checkpoint", checkpoint, "--top", 3)
    scores = [float(score) for score in re.findall(r"^  ([+-]\d\.\d\d)  a\d", out, re.MULTILINE)]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_news_desk(script, checkpoint, tmp_path):
    script("news_desk/desk.py", "--checkpoint", checkpoint, "--output", "news.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "news.jsonl").read_text(encoding="utf-8").splitlines()]
    articles = sorted((EXAMPLES / "news_desk/articles").glob("*.txt"))
    assert [line["file"] for line in lines] == [article.name for article in articles]
    texts = [article.read_text(encoding="utf-8") for article in articles]
    for line, answer in zip(lines, sparse_ft.load(checkpoint).predict(texts, ["topic", "ner"]), strict=True):
        assert line["topic"] == answer.tasks["topic"]["label"]
        names = {(kind, text) for kind in ("PER", "ORG", "LOC", "MISC") for text in line.get(kind, [])}
        assert names == {(entity["type"], entity["text"]) for entity in answer.tasks["ner"]["entities"]}


def test_domain_experts(script, tiny_bert):
    out = script("domain_experts/domains.py", "--output", "domains", "--backbone", tiny_bert, "--quick")
    assert len(re.findall(r"^  (hotels|gadgets) +[01]\.\d\d   (posi|nega)tive", out, re.MULTILINE)) == 6
    assert len(re.findall(r"^  (posi|nega)tive [01]\.\d\d", out, re.MULTILINE)) == 6


def test_own_task(script, tiny_bert):
    out = script("own_task/repairs.py", "--output", "repairs", "--backbone", tiny_bert, "--quick")
    assert "repairs · test" in out
    assert len(re.findall(r"^(plumbing|electricity|heating|cleaning) +[01]\.\d\d   ", out, re.MULTILINE)) == 4


def test_peft_round_trip(script, checkpoint, tiny_bert):
    out = script(
        "peft_round_trip/round_trip.py", "--checkpoint", checkpoint, "--output", "back", "--backbone", tiny_bert
    )
    assert float(re.search(r"in PEFT: (\S+)", out).group(1)) < 1e-4
    assert float(re.search(r"it is back: (\S+)", out).group(1)) == 0
    assert re.search(r"^(World|Sports|Business|Sci/Tech) +\S", out, re.MULTILINE)
