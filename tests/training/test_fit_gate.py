"""A gate fitted on toy tasks, used by predict and evaluate, kept in the checkpoint."""

import json
import shutil

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from toys import MARKS, marked, run, settings, toy_rows, write_toy

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.checkpoint.manifest import MANIFEST, read_config, read_manifest
from sparse_ft.config import GateConfig
from sparse_ft.errors import CheckpointError, ConfigError, DataError
from sparse_ft.experts.gates import PrototypeGate, SequenceGate
from sparse_ft.experts.inference import text_routing
from sparse_ft.training.fit_gate import fit_on_means


@pytest.fixture(scope="module", params=[0, 1], ids=["from the embeddings", "from block 1"])
def gated(request, tmp_path_factory, tiny_bert):
    """A checkpoint of two tasks with the gate between them."""
    folder = tmp_path_factory.mktemp("gated")
    tasks = [marked(folder, name) for name in MARKS]
    return run(
        tasks,
        tiny_bert,
        folder / "checkpoint",
        train__epochs=5,
        experts__first_block=request.param,
        gate__block=request.param,
    ).path


MOOD, NAMES = (" ".join(words) for words in MARKS.values())
TEXTS = [f"{MOOD} loved the table", f"{NAMES} Ada London of", f"{MOOD} weather boring", f"{NAMES} half Geneva six"]


def test_two_tasks_get_a_gate_that_tells_them_apart(gated):
    checkpoint = load_checkpoint(gated)
    assert isinstance(checkpoint.model.gate, SequenceGate)
    assert checkpoint.model.gate.names == checkpoint.model.experts.names == ["mood", "names"]
    assert {entry["routing_accuracy"] for entry in checkpoint.metrics.values()} == {1.0}
    routing = sparse_ft.evaluate(gated, route="gate", device="cpu").routing
    assert routing.accuracy == 1.0
    assert routing.confusion == {"mood": {"mood": 16}, "names": {"names": 16}}
    assert routing.dead == []


def test_one_task_gets_none_and_predict_answers_it(tmp_path, tiny_bert):
    path = run([marked(tmp_path, "mood", sizes=(16, 4, 4))], tiny_bert, tmp_path / "out", train__epochs=1).path
    model = sparse_ft.load(path)
    assert model.checkpoint.model.gate is None
    assert set(model(TEXTS[0]).tasks) == {"mood"}
    with pytest.raises(ConfigError, match=r"has no gate to choose among its experts\. Fit one with `sparse-ft train"):
        sparse_ft.evaluate(path, route="gate", device="cpu")


def test_predict_without_a_task_answers_what_the_gate_chose_as_if_it_were_named(gated):
    model = sparse_ft.load(gated)
    found = model(TEXTS)
    assert [list(prediction.tasks) for prediction in found] == [["mood"], ["names"], ["mood"], ["names"]]
    for text, prediction in zip(TEXTS, found, strict=True):
        (task,) = prediction.tasks
        named = model.predict([text], [task])[0]
        assert prediction.tasks[task].keys() == named.tasks[task].keys()
        if task == "mood":
            assert prediction.tasks[task]["label"] == named.tasks[task]["label"]
            assert prediction.tasks[task]["score"] == pytest.approx(named.tasks[task]["score"], abs=1e-5)
        else:
            spans = [
                [(entity["type"], entity["start"], entity["end"]) for entity in answer["entities"]]
                for answer in (prediction.tasks[task], named.tasks[task])
            ]
            assert spans[0] == spans[1]
        assert sum(prediction.routing.values()) == pytest.approx(1.0, abs=1e-5)
        assert max(prediction.routing, key=prediction.routing.__getitem__) == task
        assert not prediction.unknown
        assert "unknown" not in prediction.to_dict()


def test_all_still_means_all(gated):
    model = sparse_ft.load(gated)
    for prediction in model.predict(TEXTS, "all"):
        assert set(prediction.tasks) == set(MARKS)
        assert prediction.routing == {"mood": 1.0, "names": 1.0}


def test_all_tasks_at_once_equal_each_alone(gated):
    """Texts with words that the tagger cuts otherwise than the classifier share no trunk."""
    model = sparse_ft.load(gated)
    texts = [*TEXTS, f"{MOOD}, don't you think?", "", "  ", "Ada's three-and-six"]
    together = model.predict(texts, "all")
    for task in MARKS:
        for one, other in zip(together, model.predict(texts, [task]), strict=True):
            left, right = one.tasks[task], other.tasks[task]
            if task == "mood":
                assert left["label"] == right["label"]
                assert left["score"] == pytest.approx(right["score"], abs=1e-5)
            else:
                assert [entity["text"] for entity in left["entities"]] == [
                    entity["text"] for entity in right["entities"]
                ]


def test_the_gate_says_the_same_in_any_company_and_order(gated):
    model = sparse_ft.load(gated)
    together = {prediction.text: prediction for prediction in model(TEXTS[::-1] * 3)}
    for text in TEXTS:
        assert list(model(text).tasks) == list(together[text].tasks)
        assert model(text).routing == pytest.approx(together[text].routing, abs=1e-5)
    assert [prediction.text for prediction in model.stream(iter(TEXTS * 100))] == TEXTS * 100


def test_scores_by_gate_are_those_by_task_where_the_gate_is_right(gated):
    by_gate, by_task = (sparse_ft.evaluate(gated, route=route, device="cpu") for route in ("gate", "task"))
    for task in MARKS:
        assert by_gate.tasks[task].score.metrics == pytest.approx(by_task.tasks[task].score.metrics)
    assert by_task.routing.accuracy == 1.0
    assert by_task.to_dict()["routing"]["usage"] == {"mood": {"mood": 1.0}, "names": {"names": 1.0}}
    assert "routing" in by_gate.to_text()
    assert "accuracy 1.0000" in by_gate.to_text()


def test_route_by_name_sends_every_row_to_that_expert(gated):
    wrong = sparse_ft.evaluate(gated, tasks=["mood"], route="names", device="cpu")
    assert wrong.routing.confusion == {"mood": {"names": 16}}
    assert wrong.routing.accuracy == 0.0
    assert wrong.routing.dead == ["mood"]
    with pytest.raises(ConfigError, match=r"Unknown route 'nams'\. Did you mean 'names'\?"):
        sparse_ft.evaluate(gated, route="nams", device="cpu")


def test_texts_below_the_confidence_that_was_asked_are_unknown(gated):
    model = sparse_ft.load(gated)
    gate = model.checkpoint.model.gate
    object.__setattr__(gate.selection, "min_confidence", 0.02)
    strange = model("analytical analytical analytical analytical")
    assert strange.unknown
    assert strange.tasks == {}
    assert strange.to_dict()["unknown"] is True
    examples = model.encoder.texts(TEXTS * 10)
    confidence = text_routing(model.checkpoint.model, examples).confidence
    assert confidence.min() >= 0
    assert confidence.max() <= 1


def test_loading_gives_the_same_gate(gated, tmp_path):
    first = load_checkpoint(gated).model
    shutil.copytree(gated, tmp_path / "copy")
    second = load_checkpoint(tmp_path / "copy").model
    for name, tensor in first.gate.state_dict().items():
        assert torch.equal(tensor, second.gate.state_dict()[name])
    assert first.gate.selection == second.gate.selection
    (tmp_path / "copy/gate.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"gate\.safetensors is missing"):
        load_checkpoint(tmp_path / "copy")
    shutil.copy(gated / "gate.safetensors", tmp_path / "copy")
    manifest = read_manifest(gated)
    manifest["gate"]["type"] = "oracle"
    (tmp_path / "copy" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"describes a gate that this version does not know: KeyError\('oracle'\)"
    ):
        load_checkpoint(tmp_path / "copy")
    manifest["gate"]["type"] = "sequence"
    del manifest["gate"]["pairs"]  # as before gates knew any
    (tmp_path / "copy" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"KeyError\('pairs'\)\. Update sparse-ft, or train again if"):
        load_checkpoint(tmp_path / "copy")


def test_stage_gate_says_which_settings_it_does_not_heed(gated, tmp_path, caplog):
    overrides = ["gate.type=prototype", "train.epochs=99", "experts.rank=64"]
    sparse_ft.train(from_checkpoint=gated, output=tmp_path / "out", overrides=overrides, stage="gate", device="cpu")
    assert "Only the gate is fitted: experts.rank, train.epochs say nothing here." in caplog.text


def test_stage_gate_changes_the_gate_only(gated, tmp_path):
    result = sparse_ft.train(
        from_checkpoint=gated, output=tmp_path / "out", overrides=["gate.type=prototype"], stage="gate", device="cpu"
    )
    assert result.evaluation.route == "gate"
    assert result.evaluation.routing.accuracy > 0.7
    before, after = load_checkpoint(gated), load_checkpoint(result.path)
    assert type(after.model.gate) is PrototypeGate
    for name in before.model.experts.names:
        left, right = (checkpoint.model.experts.get(name).deltas for checkpoint in (before, after))
        assert all(
            torch.equal(part, right[module][place]) for module, pair in left.items() for place, part in enumerate(pair)
        )
    assert after.metrics["mood"]["validation"] == before.metrics["mood"]["validation"]


def test_stage_gate_keeps_what_the_old_gate_was_told(gated, tmp_path):
    options = {"from_checkpoint": gated, "stage": "gate", "device": "cpu"}
    first = sparse_ft.train(output=tmp_path / "first", overrides=["gate.min_confidence=0.1", "gate.rows=30"], **options)
    options["from_checkpoint"] = first.path
    for changes, expected in (([], (0.1, 30, 50)), (["gate.rows=20", "data.train_limit=25"], (0.1, 20, 25))):
        result = sparse_ft.train(output=tmp_path / str(len(changes)), overrides=changes, **options)
        config = read_config(result.path / "config.yaml")
        assert (config.gate.min_confidence, config.gate.rows, config.data.train_limit or 50) == expected
        assert load_checkpoint(result.path).model.gate.selection.min_confidence == 0.1
    prototypes = sparse_ft.train(output=tmp_path / "other", overrides=["gate.type=prototype"], **options).path
    assert read_config(prototypes / "config.yaml").gate.min_confidence == 0  # another gate, another threshold


def test_stage_gate_needs_a_checkpoint_with_several_experts(gated, tmp_path, tiny_bert):
    with pytest.raises(ConfigError, match="--stage gate needs the checkpoint with the experts: add --from CHECKPOINT"):
        sparse_ft.train(stage="gate", output=tmp_path / "out")
    single = run([marked(tmp_path, "mood", sizes=(16, 4, 4))], tiny_bert, tmp_path / "one", train__epochs=1).path
    with pytest.raises(ConfigError, match="has one expert, so there is nothing for a gate to choose"):
        sparse_ft.train(stage="gate", from_checkpoint=single, output=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"gate\.top_k is 3, but there are 2 experts\. Lower it\."):
        sparse_ft.train(stage="gate", from_checkpoint=gated, overrides=["gate.top_k=3"], output=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"gate\.top_k is 2, but there are 1 experts\. Lower it\."):
        sparse_ft.train(
            [marked(tmp_path, "mood")],
            backbone=str(tiny_bert),
            overrides=settings(gate__top_k=2),
            output=tmp_path / "out",
        )
    with pytest.raises(ConfigError, match=r"gate\.block is 9, but the blocks are 0 to 2\. Choose one of them\."):
        run([marked(tmp_path, "mood")], tiny_bert, tmp_path / "out", gate__block=9)
    with pytest.raises(ConfigError, match=r"--stage gate fits the gate over all tasks of --from; leave out --task"):
        sparse_ft.train(["ner"], stage="gate", from_checkpoint=gated, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_expert_with_a_single_text_costs_the_gate_and_not_the_run(tmp_path, tiny_bert, caplog):
    tasks = [marked(tmp_path, "mood", sizes=(24, 8, 8)), marked(tmp_path, "names", sizes=(1, 8, 8))]
    path = run(tasks, tiny_bert, tmp_path / "out", train__epochs=1).path
    assert (
        "The checkpoint gets no gate. The gate needs texts of every expert, and 'names' has fewer than two"
        in caplog.text
    )
    assert load_checkpoint(path).model.gate is None


def test_stage_gate_heeds_the_seed_that_was_asked(gated, tmp_path):
    options = {"from_checkpoint": gated, "stage": "gate", "device": "cpu", "overrides": ["gate.rows=20"]}
    paths = [sparse_ft.train(output=tmp_path / str(seed), seed=seed, **options).path for seed in (1, 2)]
    first, second = (load_checkpoint(path).model.gate.classifier[0].weight for path in paths)
    assert not torch.equal(first, second)


def test_a_new_task_gets_into_the_gate_and_without_the_old_rows_there_is_none(gated, tmp_path, caplog):
    third = write_toy(tmp_path, "about", sizes=(24, 8, 8))
    options = {"from_checkpoint": gated, "overrides": settings(train__epochs=1), "device": "cpu"}
    path = sparse_ft.train([third], output=tmp_path / "three", **options).path
    model = load_checkpoint(path).model
    assert model.gate.names == ["mood", "names", "about"]
    hidden = gated.parent / "mood/train.jsonl"
    content = hidden.read_text()
    hidden.unlink()
    try:
        other = write_toy(tmp_path, "reply", sizes=(24, 8, 8))
        path = sparse_ft.train([other], output=tmp_path / "other", **options).path
    finally:
        hidden.write_text(content)
    assert "The gate cannot be fitted without the rows of task mood" in caplog.text
    assert load_checkpoint(path).model.gate is None


def test_a_text_never_goes_to_an_expert_of_pairs_nor_a_pair_to_one_of_texts(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(24, 8, 8)) for name in ("mood", "reply")]
    model = sparse_ft.load(run(tasks, tiny_bert, tmp_path / "out", train__epochs=1).path)
    singles = [" ".join(row["text"].split()) for row in toy_rows("reply", 20)]
    assert {task for prediction in model(singles) for task in prediction.tasks} == {"mood"}
    pairs = [(row["text"], row["text_pair"]) for row in toy_rows("reply", 20)]
    assert {task for prediction in model(pairs) for task in prediction.tasks} == {"reply"}
    assert {prediction.routing["mood"] for prediction in model(pairs)} == {0.0}
    with pytest.raises(DataError, match="Some of the texts are pairs and some are not"):
        model([singles[0], pairs[0]])


def test_top_two_mixes_the_experts(gated, tmp_path):
    result = sparse_ft.train(
        from_checkpoint=gated,
        output=tmp_path / "out",
        overrides=["gate.top_k=2", "gate.temperature=100"],
        stage="gate",
        device="cpu",
    )
    model = load_checkpoint(result.path).model
    routing = text_routing(model, sparse_ft.load(result.path).encoder.texts(TEXTS))
    assert routing.experts.shape == (4, 2)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(4))
    assert (routing.weights > 0.2).all()
    mixed, alone = (
        sparse_ft.evaluate(path, tasks=["mood"], route="gate", device="cpu") for path in (result.path, gated)
    )
    usage = mixed.routing.usage["mood"]
    assert 0.2 < usage["names"] < usage["mood"] < 0.8
    assert alone.routing.usage["mood"]["mood"] == 1.0


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
    targets = [place for place, rows in enumerate(test.values()) for _ in rows]
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
    errors = [float((chosen != place).float().mean()) for place, chosen in enumerate(best)]
    assert abs(errors[0] - errors[1]) < 0.1
    assert max(errors) < 0.25


def test_a_gate_fitted_on_the_same_rows_with_the_same_seed_is_the_same():
    train = rings(50, seed=0)
    tokens = {name: [[1, 2, 3]] * 50 for name in train}
    first, second, other = (fit_on_means(train, tokens, settings=GateConfig(), seed=seed) for seed in (1, 1, 2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.classifier[0].weight, other.classifier[0].weight)
