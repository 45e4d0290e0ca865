"""A gate fitted on toy tasks, used by predict and evaluate, kept in the checkpoint."""

import json
import shutil

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from toy_checkpoints import saved
from toys import MARKS, marked, run, settings, toy_rows, write_toy

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.checkpoint.manifest import MANIFEST, read_config
from sparse_ft.config import GateConfig
from sparse_ft.errors import CheckpointError, ConfigError, DataError
from sparse_ft.experts.gates import PrototypeGate, SequenceGate
from sparse_ft.prediction.routes import Route
from sparse_ft.training.fit_gate import fit_on_means

MOOD, NAMES = (" ".join(words) for words in MARKS.values())
TEXTS = [f"{MOOD} loved the table", f"{NAMES} Ada London of", f"{MOOD} weather boring", f"{NAMES} half Geneva six"]


def train_gated(folder, backbone, *, block):
    tasks = [marked(folder, name) for name in MARKS]
    changes = {"experts__first_block": block, "gate__block": block}
    return run(tasks, backbone, folder / "checkpoint", train__epochs=1, **changes).path


@pytest.fixture(scope="module")
def gated(tmp_path_factory, tiny_bert):
    """A checkpoint of two tasks with the gate between them; read-only."""
    return train_gated(tmp_path_factory.mktemp("gated"), tiny_bert, block=0)


def fit(checkpoint, output, *overrides, seed=None):
    """Fit the gate of a checkpoint anew."""
    return sparse_ft.train(
        from_checkpoint=checkpoint, output=output, overrides=overrides, stage="gate", seed=seed, device="cpu"
    )


@pytest.mark.parametrize("block", [0, 1], ids=["from the embeddings", "from block 1"])
def test_two_tasks_get_a_gate_that_tells_them_apart(gated, tmp_path, tiny_bert, block):
    path = gated if block == 0 else train_gated(tmp_path, tiny_bert, block=block)
    checkpoint = load_checkpoint(path)
    assert isinstance(checkpoint.model.gate, SequenceGate)
    assert checkpoint.model.gate.names == checkpoint.model.experts.names == ["mood", "names"]
    assert {entry["routing_accuracy"] for entry in checkpoint.metrics.values()} == {1.0}
    by_gate, by_task = (sparse_ft.evaluate(path, route=route, device="cpu") for route in ("gate", "task"))
    assert by_gate.routing.confusion == {"mood": {"mood": 16}, "names": {"names": 16}}
    assert by_gate.routing.accuracy == by_task.routing.accuracy == 1.0
    assert by_gate.routing.dead == []
    for task in MARKS:
        assert by_gate.tasks[task].score.metrics == pytest.approx(by_task.tasks[task].score.metrics)
    assert by_task.to_dict()["routing"]["usage"] == {"mood": {"mood": 1.0}, "names": {"names": 1.0}}
    assert "accuracy 1.0000" in by_gate.to_text()


def test_one_task_gets_none_and_predict_answers_it(tmp_path, make_model):
    path = saved(tmp_path / "first", make_model, "bert", heads={"mood": ("text", 2)})
    assert set(sparse_ft.load(path)(TEXTS[0]).tasks) == {"mood"}
    with pytest.raises(ConfigError, match=r"no gate .*`sparse-ft train"):
        sparse_ft.evaluate(path, route="gate", device="cpu")


def test_predict_without_a_task_answers_as_if_the_task_of_the_gate_were_named(gated):
    model = sparse_ft.load(gated)
    answers = model(TEXTS)
    assert [list(answer.tasks) for answer in answers] == [["mood"], ["names"], ["mood"], ["names"]]
    for text, answer in zip(TEXTS, answers, strict=True):
        (task,) = answer.tasks
        named = model.predict([text], [task])[0].tasks[task]
        if task == "mood":
            assert answer.tasks[task]["label"] == named["label"]
            assert answer.tasks[task]["score"] == pytest.approx(named["score"], abs=1e-5)
        else:
            assert [entity["start"] for entity in answer.tasks[task]["entities"]] == [
                entity["start"] for entity in named["entities"]
            ]
        assert sum(answer.routing.values()) == pytest.approx(1.0, abs=1e-5)
        assert max(answer.routing, key=answer.routing.__getitem__) == task
        assert "unknown" not in answer.to_dict()
    for answer in model.predict(TEXTS, "all"):
        assert set(answer.tasks) == set(MARKS)
        assert answer.routing == {"mood": 1.0, "names": 1.0}


def test_the_gate_says_the_same_in_any_company_and_order(gated):
    model = sparse_ft.load(gated)
    together = {answer.text: answer for answer in model(TEXTS[::-1] * 3)}
    for text in TEXTS:
        assert list(model(text).tasks) == list(together[text].tasks)
        assert model(text).routing == pytest.approx(together[text].routing, abs=1e-5)
    assert [answer.text for answer in model.stream(iter(TEXTS * 40))] == TEXTS * 40


def test_route_by_name_sends_every_row_to_that_expert(gated):
    wrong = sparse_ft.evaluate(gated, tasks=["mood"], route="names", device="cpu")
    assert wrong.routing.confusion == {"mood": {"names": 16}}
    assert wrong.routing.accuracy == 0.0
    assert wrong.routing.dead == ["mood"]
    with pytest.raises(ConfigError, match=r"'nams'\. Did you mean 'names'\?"):
        sparse_ft.evaluate(gated, route="nams", device="cpu")


def test_texts_below_the_least_confidence_are_unknown(gated):
    model = sparse_ft.load(gated)
    object.__setattr__(model.checkpoint.model.gate.selection, "min_confidence", 0.02)
    strange = model("analytical analytical analytical analytical")
    assert strange.unknown
    assert strange.tasks == {}
    assert strange.to_dict()["unknown"] is True
    confidence = Route("gate", model.checkpoint.model).rows(model.encoder.texts(TEXTS)).confidence
    assert confidence.min() >= 0
    assert confidence.max() <= 1


def test_loading_gives_the_same_gate_and_a_damaged_one_is_refused(gated, tmp_path):
    first = load_checkpoint(gated).model
    copied = shutil.copytree(gated, tmp_path / "copy")
    second = load_checkpoint(copied).model
    for name, tensor in first.gate.state_dict().items():
        assert torch.equal(tensor, second.gate.state_dict()[name])
    assert first.gate.selection == second.gate.selection
    manifest = json.loads((gated / MANIFEST).read_text())
    older = {name: value for name, value in manifest["gate"].items() if name != "pairs"}  # as before gates knew any
    for gate, said in (
        ({**manifest["gate"], "type": "oracle"}, "oracle"),
        (older, "pairs: Field required"),
    ):
        (copied / MANIFEST).write_text(json.dumps({**manifest, "gate": gate}))
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(copied)
    (copied / MANIFEST).write_text(json.dumps(manifest))
    (copied / "gate.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"gate\.safetensors"):
        load_checkpoint(copied)


# The stage of the gate alone


def test_stage_gate_changes_the_gate_only_and_says_which_settings_it_does_not_heed(gated, tmp_path, caplog):
    result = fit(gated, tmp_path / "out", "gate.type=prototype", "train.epochs=99", "experts.rank=64")
    assert "experts.rank, train.epochs" in caplog.text
    assert result.evaluation.route == "gate"
    assert result.evaluation.routing.accuracy > 0.7
    before, after = load_checkpoint(gated), load_checkpoint(result.path)
    assert type(after.model.gate) is PrototypeGate
    for name in before.model.experts.names:
        left, right = (checkpoint.model.experts.get(name).deltas for checkpoint in (before, after))
        assert all(torch.equal(*parts) for module in left for parts in zip(left[module], right[module], strict=True))
    assert after.metrics["mood"]["validation"] == before.metrics["mood"]["validation"]


def test_stage_gate_keeps_the_settings_of_the_old_gate_and_heeds_the_seed(gated, tmp_path):
    first = fit(gated, tmp_path / "first", "gate.min_confidence=0.1", "gate.rows=20", seed=1).path
    again = fit(first, tmp_path / "again", "data.train_limit=25", seed=2).path
    config = read_config(again / "config.yaml")
    assert (config.gate.min_confidence, config.gate.rows, config.data.train_limit) == (0.1, 20, 25)
    gates = [load_checkpoint(path).model.gate for path in (first, again)]
    assert [gate.selection.min_confidence for gate in gates] == [0.1, 0.1]
    assert not torch.equal(*(gate.classifier[0].weight for gate in gates))
    prototypes = fit(first, tmp_path / "other", "gate.type=prototype").path
    assert read_config(prototypes / "config.yaml").gate.min_confidence is None  # another gate, another threshold


def test_top_two_mixes_the_experts(gated, tmp_path):
    path = fit(gated, tmp_path / "out", "gate.top_k=2", "gate.temperature=100").path
    routing = Route("gate", load_checkpoint(path).model).rows(sparse_ft.load(path).encoder.texts(TEXTS))
    assert routing.experts.shape == (4, 2)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(4))
    assert (routing.weights > 0.2).all()
    usage = sparse_ft.evaluate(path, tasks=["mood"], route="gate", device="cpu").routing.usage["mood"]
    assert 0.2 < usage["names"] < usage["mood"] < 0.8


@pytest.mark.parametrize(("options", "said"), [
    ({}, "--from CHECKPOINT"),
    ({"from_checkpoint": "single"}, "one expert"),
    ({"from_checkpoint": "gated", "overrides": ["gate.top_k=3"]}, r"gate\.top_k is 3"),
    ({"from_checkpoint": "gated", "overrides": ["gate.block=9"]}, r"gate\.block is 9"),
    ({"from_checkpoint": "gated", "tasks": ["ner"]}, "--task"),
])  # fmt: skip
def test_stage_gate_needs_a_checkpoint_with_several_experts(gated, tmp_path, make_model, options, said):
    if options.get("from_checkpoint") == "gated":
        options = {**options, "from_checkpoint": gated}
    elif "from_checkpoint" in options:
        single = saved(tmp_path / "first", make_model, "bert", heads={"mood": ("text", 2)})
        options = {**options, "from_checkpoint": single}
    with pytest.raises(ConfigError, match=said):
        sparse_ft.train(stage="gate", output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# Which experts the gate of a run knows


def test_an_expert_with_a_single_text_costs_the_gate_and_not_the_run(tmp_path, tiny_bert, caplog):
    tasks = [marked(tmp_path, "mood", sizes=(24, 8, 8)), marked(tmp_path, "names", sizes=(1, 8, 8))]
    path = run(tasks, tiny_bert, tmp_path / "out", train__epochs=1).path
    assert "'names' has fewer than two" in caplog.text
    assert load_checkpoint(path).model.gate is None


def test_a_new_task_gets_into_the_gate_and_without_the_old_rows_there_is_none(gated, tmp_path, caplog):
    third = write_toy(tmp_path, "about", sizes=(16, 8, 8))
    options = {"from_checkpoint": gated, "overrides": settings(train__epochs=1), "device": "cpu"}
    path = sparse_ft.train([third], output=tmp_path / "three", **options).path
    assert load_checkpoint(path).model.gate.names == ["mood", "names", "about"]
    hidden = gated.parent / "mood/train.jsonl"
    content = hidden.read_text()
    hidden.unlink()
    try:
        path = sparse_ft.train([third], output=tmp_path / "other", **options).path
    finally:
        hidden.write_text(content)
    assert "without the rows of task mood" in caplog.text
    assert load_checkpoint(path).model.gate is None


def test_a_text_never_goes_to_an_expert_of_pairs_nor_a_pair_to_one_of_texts(toys):
    model = sparse_ft.load(toys)
    singles = [" ".join(row["text"].split()) for row in toy_rows("reply", 20)]
    assert "reply" not in {task for answer in model(singles) for task in answer.tasks}
    pairs = [(row["text"], row["text_pair"]) for row in toy_rows("reply", 20)]
    answers = model(pairs)
    assert {task for answer in answers for task in answer.tasks} == {"reply"}
    assert {answer.routing["mood"] for answer in answers} == {0.0}
    with pytest.raises(DataError, match="pairs"):
        model([singles[0], pairs[0]])


# The perceptron on means


def rings(rows, *, seed):
    """Two experts that no hyperplane separates: means of what enters two blocks, near to 0 and far from it."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2, rows, 4, generator=generator), dim=-1)
    return {"near": directions[0].view(rows, 2, 2), "far": 4 * directions[1].view(rows, 2, 2)}


def test_the_perceptron_separates_what_no_linear_classifier_does():
    train, test = rings(400, seed=0), rings(200, seed=1)
    tokens = {name: [[1, 2, 3]] * len(rows) for name, rows in train.items()}
    gate = fit_on_means(train, tokens, settings=GateConfig(), seed=0)
    assert gate.block == 1
    targets = [index for index, rows in enumerate(test.values()) for _ in rows]
    routing = gate.decide(torch.cat(list(test.values())), [[1, 2, 3]] * len(targets))
    right = sum(map(int.__eq__, routing.experts.flatten().tolist(), targets)) / len(targets)
    linear = LogisticRegression().fit(torch.cat(list(train.values())).flatten(1).numpy(), [0] * 400 + [1] * 400)
    assert linear.score(torch.cat(list(test.values())).flatten(1).numpy(), targets) < 0.7
    assert right > 0.95


@pytest.mark.parametrize("kind", ["sequence", "prototype"])
def test_an_expert_with_many_texts_counts_as_much_as_one_with_few(kind):
    generator = torch.Generator().manual_seed(0)

    def draw(rows, middle):
        return middle + torch.randn(rows, 1, 6, generator=generator)

    train = {"few": draw(100, 1.0), "many": draw(2000, -1.0)}
    tokens = {name: [[1, 2]] * len(rows) for name, rows in train.items()}
    gate = fit_on_means(train, tokens, settings=GateConfig(type=kind), seed=0)
    best = [gate.decide(draw(500, middle), [[1, 2]] * 500).logits.argmax(-1) for middle in (0.5, -0.5)]
    errors = [float((chosen != index).float().mean()) for index, chosen in enumerate(best)]
    assert abs(errors[0] - errors[1]) < 0.1
    assert max(errors) < 0.25


def test_a_gate_fitted_on_the_same_rows_with_the_same_seed_is_the_same():
    train = rings(50, seed=0)
    tokens = {name: [[1, 2, 3]] * 50 for name in train}
    first, second, other = (fit_on_means(train, tokens, settings=GateConfig(), seed=seed) for seed in (1, 1, 2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.classifier[0].weight, other.classifier[0].weight)
