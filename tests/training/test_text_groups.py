"""Tasks that are asked of the same texts: found, answered together, and no rivals of each other."""

import json
import random
import shutil

import pytest
import torch
from toys import MARKS, call, run, toy_rows, train_joint, write_rows, write_toy

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.checkpoint.manifest import MANIFEST, read_manifest
from sparse_ft.config import GateConfig
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.evaluation.token_routing import route_tokens
from sparse_ft.experts.gates import build_gate
from sparse_ft.merging.edit import edit
from sparse_ft.merging.merge import merge
from sparse_ft.training.fit_gate import fit_on_means
from sparse_ft.training.text_groups import Pair, joined, pairs_by_state, pairs_by_text

SIZES = (150, 24, 16)


def mails(folder, *, shared=1.0):
    """Write mood and names, asked of the same marked texts, or of a share of them, and about, asked of others."""
    tasks = [write_toy(folder, name, sizes=SIZES) for name in ("mood", "names", "about")]
    for seed, (split, size) in enumerate(zip(("train", "validation", "test"), SIZES, strict=True)):
        tagged = toy_rows("names", 2 * size, seed=seed)
        for row in tagged:
            row["tokens"], row["tags"] = [*MARKS["names"], *row["tokens"]], ["O"] * len(MARKS["names"]) + row["tags"]
        texts = [{"text": " ".join(row["tokens"]), "label": "gb"["Ada" in row["tokens"]]} for row in tagged]
        others = [
            {**row, "text": " ".join([*MARKS["mood"], row["text"]])} for row in toy_rows("about", size, seed=seed)
        ]
        start = round((1 - shared) * size)
        write_rows(folder / "names" / f"{split}.jsonl", tagged[:size])
        write_rows(folder / "mood" / f"{split}.jsonl", texts[start : start + size])
        write_rows(folder / "about" / f"{split}.jsonl", others)
    return tasks


@pytest.fixture(scope="module")
def grouped(tmp_path_factory, tiny_bert):
    """A checkpoint of three tasks, two of which are asked of the same texts; read-only."""
    folder = tmp_path_factory.mktemp("grouped")
    return run(mails(folder), tiny_bert, folder / "checkpoint", train__epochs=1, experts__first_block=1).path


MAIL = " ".join([*MARKS["names"], "the table of London"])
OTHER = " ".join([*MARKS["mood"], "music at six"])


def test_tasks_with_the_same_texts_are_answered_together_and_the_others_are_named(grouped, monkeypatch, capsys):
    assert read_manifest(grouped).gate.groups == [["mood", "names"]]
    model = sparse_ft.load(grouped)
    mail, other = model([MAIL, OTHER])
    assert (list(mail.tasks), mail.left_out) == (["mood", "names"], ["about"])
    assert (list(other.tasks), other.left_out) == (["about"], ["mood", "names"])
    named = model.predict([MAIL], ["mood", "names"])[0]
    assert mail.tasks["mood"]["label"] == named.tasks["mood"]["label"]
    assert mail.tasks["mood"]["score"] == pytest.approx(named.tasks["mood"]["score"], abs=1e-5)
    assert [entity["start"] for entity in mail.tasks["names"]["entities"]] == [
        entity["start"] for entity in named.tasks["names"]["entities"]
    ]
    assert mail.routing["mood"] == mail.routing["names"] > 0.5
    assert mail.routing["mood"] + mail.routing["about"] == pytest.approx(1, abs=1e-5)
    assert model(MAIL).routing == pytest.approx(mail.routing, abs=1e-5)  # in any company
    code, out, _ = call(monkeypatch, capsys, "predict", grouped, MAIL, "--device", "cpu")
    assert code == 0
    assert out.splitlines()[-1] == "  not answered: about"
    assert "not answered" not in call(monkeypatch, capsys, "predict", grouped, MAIL, "--task", "all")[1]


def test_the_run_says_what_it_found(tmp_path, grouped, caplog):
    caplog.set_level("INFO", "sparse_ft")
    sparse_ft.train(from_checkpoint=grouped, output=tmp_path / "out", stage="gate", device="cpu")
    assert "mood and names are asked of the same texts: they form one group and are answered together" in caplog.text
    assert "mood and names: 100% of the texts are the same" in caplog.text
    assert "The gate sends 100.0 % of the validation rows of mood to its group" in caplog.text


def test_scores_and_the_report_are_by_group(grouped):
    metrics = load_checkpoint(grouped).metrics
    assert {metrics[task]["routing_accuracy"] for task in metrics} == {1.0}
    by_gate, by_task = (sparse_ft.evaluate(grouped, route=route, device="cpu") for route in ("gate", "task"))
    assert by_gate.routing.confusion == {task: {task: SIZES[2]} for task in ("mood", "names", "about")}
    assert by_gate.routing.accuracy == 1.0
    assert by_gate.to_dict()["routing"]["groups"] == [["mood", "names"]]
    assert by_gate.routing.to_text().splitlines()[2].split() == ["task", "mood+names", "about", "right", "entropy"]
    assert sparse_ft.evaluate(grouped, tasks=["mood"], route="gate", device="cpu").routing.dead == ["about"]
    for task, entry in by_task.tasks.items():
        assert by_gate.tasks[task].score.metrics == pytest.approx(entry.score.metrics)


def test_inspect_shows_every_expert_of_the_group(grouped, monkeypatch, capsys):
    routing = route_tokens(grouped, MAIL, device="cpu")
    assert routing.usage == {"mood": 1.0, "names": 1.0, "about": 0.0}
    assert routing.probabilities["mood"] == routing.probabilities["names"] > 0.5
    assert 0 < routing.familiarity <= 1
    assert "mood and names are answered together" in call(monkeypatch, capsys, "inspect", grouped)[1]


def test_groups_stay_through_renaming_and_a_gate_without_a_member_goes(grouped, tmp_path):
    renamed = edit(grouped, output=tmp_path / "renamed", rename=[("mood", "feeling")]).path
    assert read_manifest(renamed).gate.groups == [["feeling", "names"]]
    assert len(sparse_ft.load(renamed)(MAIL).tasks) == 2
    removed = edit(grouped, output=tmp_path / "removed", remove=["names"])
    assert any("The gate is dropped" in line for line in removed.changes)
    assert list(sparse_ft.load(removed.path)(MAIL).tasks) == ["mood", "about"]  # without a gate all tasks answer


def test_rules_choose_single_experts(grouped, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {contains: [shares], expert: names}\n- {otherwise: about}\n")
    answer = sparse_ft.load(grouped, rules=rules)(MAIL)
    assert (list(answer.tasks), answer.routing, answer.left_out) == (["names"], {"names": 1.0}, ["mood", "about"])


def test_a_stack_finds_the_groups_of_several_checkpoints(tmp_path, tiny_bert):
    paths = [run([task], tiny_bert, tmp_path / f"single{index}", train__epochs=1).path
             for index, task in enumerate(mails(tmp_path))]  # fmt: skip
    merge(paths, method="stack", output=tmp_path / "stack", device="cpu")
    assert read_manifest(tmp_path / "stack").gate.type == "prototype"
    assert read_manifest(tmp_path / "stack").gate.groups == [["mood", "names"]]
    assert list(sparse_ft.load(tmp_path / "stack")(MAIL).tasks) == ["mood", "names"]


def test_a_joint_run_answers_the_group_of_the_expert_that_it_mixes_most(tmp_path, tiny_bert):
    path = train_joint(mails(tmp_path), tiny_bert, tmp_path / "joint", train__epochs=1).path
    assert read_manifest(path).gate.groups == [["mood", "names"]]
    answer = sparse_ft.load(path)(MAIL)
    assert (list(answer.tasks), answer.left_out) == (["mood", "names"], ["about"])
    assert sum(answer.routing.values()) == pytest.approx(1, abs=1e-5)  # experts are mixed one by one


@pytest.mark.parametrize("groups", [[["mood", "nobody"]], [["mood", "names"], ["names", "about"]], [[]], [5], 5])
def test_damaged_groups_are_refused(grouped, groups):
    described = json.loads((grouped / MANIFEST).read_text())["gate"]
    assert build_gate(described, 32).groups == [["mood", "names"]]
    with pytest.raises((TypeError, ValueError)):
        build_gate({**described, "groups": groups}, 32)


def test_a_damaged_gate_is_no_checkpoint(grouped, tmp_path):
    copied = shutil.copytree(grouped, tmp_path / "copy")
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**manifest, "gate": {**manifest["gate"], "groups": [["nobody"]]}}))
    with pytest.raises(CheckpointError, match="'nobody' is not in list"):
        load_checkpoint(copied)


# Signs


@pytest.mark.parametrize(("shared", "found"), [(1.0, True), (0.6, True), (0.4, False)])
def test_half_of_the_texts_in_common_make_a_pair(toys, shared, found):
    encoder = sparse_ft.load(toys).encoder
    words = ["first", "second", "half", "table", "company", "weather", "analytical", "engine", "three", "six"]
    generator = random.Random(0)
    texts = [" ".join(generator.choices(words, k=6)) for _ in range(50)]
    start = round((1 - shared) * 25)
    upper = [text.upper().replace(" ", "  ") + " ." for text in texts[start : start + 25]]
    examples = {"one": encoder.texts(texts[:25]), "two": encoder.texts(upper)}
    pairs = pairs_by_text(examples, encoder.tokenizer)
    assert [pair[:2] for pair in pairs] == ([("one", "two")] if found else [])


@pytest.mark.parametrize(
    ("rows", "distance", "found"),
    [(400, 0.0, True), (400, 4.0, False), (100, 0.0, True), (100, 4.0, False), (50, 0.0, False)],
)
def test_texts_of_one_source_are_those_that_a_gate_cannot_tell_apart(rows, distance, found):
    generator = torch.Generator().manual_seed(0)
    means = {name: torch.randn(rows, 2, 4, generator=generator) for name in ("one", "two")}
    means["two"][..., 0] += distance
    assert [pair[:2] for pair in pairs_by_state(means)] == ([("one", "two")] if found else [])


def test_pairs_connect():
    pairs = [Pair("d", "a", ""), Pair("b", "a", "")]
    assert joined("abcd", pairs) == [["a", "b", "d"], ["c"]]
    assert joined("abcd", []) == [["a"], ["b"], ["c"], ["d"]]


@pytest.mark.parametrize("kind", ["sequence", "prototype"])
def test_a_group_weighs_as_much_as_one_expert(kind):
    generator = torch.Generator().manual_seed(0)

    def draw(rows, middle):
        return middle + torch.randn(rows, 1, 6, generator=generator)

    means = {"a": draw(300, 1.0), "b": draw(300, -1.0)}
    tokens = {name: [[1, 2]] * 300 for name in means}
    gate = fit_on_means(
        means, tokens, settings=GateConfig(type=kind, top_k=3), seed=0, names=["a", "b", "c", "d"],
        groups=[["a", "c", "d"], ["b"]],
    )  # fmt: skip
    assert gate.selection.top_k == 2  # no more than there are groups
    right = [gate.decide(draw(500, middle), [[1, 2]] * 500).logits.argmax(-1) for middle in (0.5, -0.5)]
    errors = [float((chosen != index).float().mean()) for index, chosen in enumerate(right)]
    assert abs(errors[0] - errors[1]) < 0.1
    assert max(errors) < 0.25


# The number that the user gives


def test_the_user_says_which_share_of_the_own_texts_is_turned_away(grouped):
    rows = [" ".join([*MARKS["names"], *row["tokens"]]) for row in toy_rows("names", 400, seed=7)]
    shares = {}
    for share in (0.1, 0.4):
        answers = sparse_ft.load(grouped, min_familiarity=share, device="cpu")(rows)
        shares[share] = sum(answer.unknown for answer in answers) / len(rows)
        assert all(not answer.tasks for answer in answers if answer.unknown)
    assert shares[0.1] == pytest.approx(0.1, abs=0.06)
    assert shares[0.4] == pytest.approx(0.4, abs=0.1)
    scored = sparse_ft.evaluate(grouped, tasks=["mood"], route="gate", min_familiarity=1.0, device="cpu")
    assert scored.routing.confusion == {"mood": {"unknown": SIZES[2]}}
    assert sparse_ft.evaluate(grouped, tasks=["mood"], route="gate", device="cpu").routing.accuracy > 0.9  # as before
    assert not route_tokens(grouped, MAIL, min_familiarity=1.0, device="cpu").weights.any()
    assert sparse_ft.predict(grouped, [MAIL], min_familiarity=1.0, device="cpu")[0].unknown
    with pytest.raises(ConfigError, match=r"to load\(\)"):
        sparse_ft.predict(sparse_ft.load(grouped), [MAIL], min_familiarity=1.0)
    named = sparse_ft.load(grouped, min_familiarity=1.0, device="cpu").predict([MAIL], ["mood"])[0]
    assert not named.unknown


@pytest.mark.parametrize(("arguments", "said"), [
    (["predict", "--min-familiarity", "1.5", "x"], "from 0 to 1"),
    (["predict", "--min-familiarity", "nan", "x"], "from 0 to 1"),
    (["predict", "--min-familiarity", "0.1", "--task", "mood", "x"], "--task"),
    (["evaluate", "--min-familiarity", "0.1"], "route is 'task'"),
    (["inspect", "--min-familiarity", "0.1"], "--text"),
])  # fmt: skip
def test_the_number_is_refused_where_it_says_nothing(grouped, monkeypatch, capsys, arguments, said):
    command, *options = arguments
    code, out, err = call(monkeypatch, capsys, command, grouped, *options)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())


def test_checkpoints_without_statistics_say_so(joint_toys, tmp_path, grouped):
    with pytest.raises(ConfigError, match=r"no gate for whole texts .* Leave the option out"):
        sparse_ft.load(joint_toys("token"), min_familiarity=0.01)
    alone = edit(grouped, output=tmp_path / "two", remove=["names"]).path
    with pytest.raises(ConfigError, match=r"no gate to measure .*--stage gate"):
        sparse_ft.load(alone, min_familiarity=0.01)
