"""The ways to route that evaluate compares."""

import json
from dataclasses import replace

import pytest
import torch
from toy_checkpoints import add_random_expert
from toys import marked, run, write_toy

import sparse_ft
from sparse_ft.backbone.words import join_words
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.prediction.arrow import arrow_gate
from sparse_ft.prediction.routes import BASELINES, ROUTES, find_route, heaviest


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_bert):
    """A checkpoint of two tasks."""
    folder = tmp_path_factory.mktemp("pair")
    tasks = [marked(folder, name) for name in ("mood", "names")]
    return run(tasks, tiny_bert, folder / "checkpoint", train__epochs=4, experts__first_block=1).path


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_baseline_scores_and_its_usage_adds_up(pair, name):
    result = sparse_ft.evaluate(pair, route=name, device="cpu")
    assert result.route == name
    for task, entry in result.tasks.items():
        assert entry.score.n == 16
        assert sum(result.routing.usage[task].values()) == pytest.approx(1.0, abs=1e-5)
        assert sum(result.routing.confusion[task].values()) == 16
    again = sparse_ft.evaluate(pair, route=name, device="cpu")
    assert again.routing.confusion == result.routing.confusion  # drawn from the seed of the run
    assert again.to_dict()["tasks"] == result.to_dict()["tasks"]


def test_what_the_baselines_choose(pair):
    def confusion(name):
        return sparse_ft.evaluate(pair, route=name, device="cpu").routing.confusion

    assert confusion("round_robin") == {"mood": {"mood": 8, "names": 8}, "names": {"mood": 8, "names": 8}}
    assert confusion("uniform") == {"mood": {"mood": 16}, "names": {"mood": 16}}  # a tie goes to the first
    usage = sparse_ft.evaluate(pair, route="uniform", device="cpu").routing.usage
    assert usage["names"] == pytest.approx({"mood": 0.5, "names": 0.5})
    assert len(confusion("load_aware")["mood"]) == 2


def test_rules_choose_and_say_which_never_matched(pair, tmp_path, caplog):
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {contains: [shares], expert: names}\n- {contains: [zebra], expert: names}\n- {expert: mood}\n")
    result = sparse_ft.evaluate(pair, route=str(rules), device="cpu")
    assert result.routing.confusion == {"mood": {"mood": 16}, "names": {"names": 16}}
    assert result.routing.accuracy == 1.0
    assert f"Rule 2 of {rules} never matched." in caplog.text
    by_task = sparse_ft.evaluate(pair, device="cpu")
    for task, entry in by_task.tasks.items():
        assert result.tasks[task].score.metrics == pytest.approx(entry.score.metrics)


def test_rows_without_a_rule_go_through_the_bare_backbone(pair, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {contains: [zebra], expert: names}\n")
    result = sparse_ft.evaluate(pair, route=str(rules), device="cpu")
    assert result.routing.confusion == {"mood": {"unknown": 16}, "names": {"unknown": 16}}
    assert result.routing.dead == ["mood", "names"]
    assert "unknown" in result.to_text()
    assert "Never chosen: mood, names" in result.to_text()


def test_arrow_points_where_each_expert_amplifies_most(make_model):
    model = make_model("bert", {}, first_block=1)
    for seed, name in enumerate(("one", "two")):
        add_random_expert(model, name, first_block=1, seed=seed)
    gate = arrow_gate(model)
    assert gate.blocks == [1, 2]
    parts = []
    for target in ("query", "key", "value"):
        lora_a, lora_b = model.experts.layers[f"encoder.layer.2.attention.self.{target}"].get(1)
        parts.append(lora_b @ lora_a)
    expected = torch.linalg.svd(torch.cat(parts).double()).Vh[0].float()
    found = gate.vectors[1][1].detach()
    assert abs(float(found @ expected)) == pytest.approx(1.0, abs=1e-4)


def test_arrow_routes_token_by_token_without_training(pair):
    result = sparse_ft.evaluate(pair, route="arrow", device="cpu")
    for task in ("mood", "names"):
        assert set(result.routing.usage[task]) == {"mood", "names"}
        assert sum(result.routing.usage[task].values()) == pytest.approx(1.0, abs=1e-4)


def test_usage_per_block_is_told_where_tokens_were_routed_and_nowhere_else(pair):
    result = sparse_ft.evaluate(pair, route="arrow", device="cpu")
    content = result.to_dict()["routing"]
    assert list(content["blocks"]) == ["1", "2"]  # experts begin at block 1
    assert json.loads(json.dumps(content)) == content
    for task, usage in result.routing.usage.items():
        for expert, share in usage.items():
            blocks = [result.routing.blocks[block][task].get(expert, 0.0) for block in (1, 2)]
            assert sum(blocks) / 2 == pytest.approx(share, abs=1e-5)
    for route in ("task", "gate", "uniform", "mood"):
        assert "blocks" not in sparse_ft.evaluate(pair, route=route, device="cpu").to_dict()["routing"]


def test_arrow_never_chooses_what_all_rows_use_anyway(tmp_path, joint_toys):
    path = joint_toys("token")
    model = load_checkpoint(path).model
    assert "shared" in model.experts.names
    assert arrow_gate(model).names == [name for name in model.experts.names if name != "shared"]
    usage = sparse_ft.evaluate(path, route="arrow", device="cpu").routing.usage
    for shares in usage.values():
        assert shares.get("shared", 0.0) == 0.0
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-4)


def test_rules_see_the_same_in_evaluate_as_in_predict(tmp_path, tiny_bert):
    """Both texts of a pair, Chinese words without spaces, and a language that the task file states."""
    pairs = write_toy(tmp_path, "reply", sizes=(16, 8, 8))
    german = write_toy(tmp_path, "mood", sizes=(16, 8, 8), language="de")
    path = run([pairs, german], tiny_bert, tmp_path / "out", train__epochs=1).path
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {language: de, expert: mood}\n- {matches: '\\t', expert: reply}\n- {otherwise: mood}\n")
    result = sparse_ft.evaluate(path, route=str(rules), device="cpu")
    assert result.routing.confusion == {"reply": {"reply": 8}, "mood": {"mood": 8}}
    assert join_words(["在", "上", "海", "met", "Ada", "。"]) == "在上海 met Ada 。"


def test_arrow_in_a_batch_equals_arrow_alone(pair):
    from sparse_ft.experts.inference import row_logits

    model = load_checkpoint(pair).model
    texts = ["Book for two tomorrow please loved", "boring", "the table of the weather loved half of it"]
    examples = sparse_ft.load(pair).encoder.texts(texts)
    gate = arrow_gate(model)
    together = row_logits(model, "mood", examples, num_rows=3, gate=gate)
    for place, example in enumerate(sparse_ft.load(pair).encoder.texts([text])[0] for text in texts):
        (alone,) = row_logits(model, "mood", [example], num_rows=1, gate=gate)
        torch.testing.assert_close(alone, together[place], atol=1e-5, rtol=1e-4)


def test_arrow_on_an_architecture_that_cannot_route_tokens_is_refused(make_model):
    model = make_model("deberta-v2", {"mood": ("text", 3)})
    with pytest.raises(ConfigError, match="cannot be routed one by one"):
        arrow_gate(model)


def test_an_unknown_route_is_refused_with_all_that_there_are(pair, tmp_path):
    model = load_checkpoint(pair).model
    with pytest.raises(ConfigError, match=r"Unknown route 'unifrom'\. Did you mean 'uniform'\?.*YAML file with rules"):
        find_route("unifrom", model)
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        find_route(str(tmp_path / "none.yaml"), model)
    assert set(ROUTES) == {"task", "gate", "arrow", *BASELINES}


def test_a_route_gives_a_routing_of_rows_or_hands_over_the_gate_that_decides_in_blocks(pair, tmp_path):
    model = load_checkpoint(pair).model
    texts, experts = ["loved", "shares"], model.experts.names
    examples = sparse_ft.load(pair).encoder.texts(texts)
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {contains: [shares], expert: names}\n")
    assert heaviest(find_route("task", model).rows(examples, task="mood"), experts) == ["mood", "mood"]
    assert heaviest(find_route("names", model).rows(examples), experts) == ["names", "names"]
    assert heaviest(find_route("gate", model).rows(examples, among=["names"]), experts) == ["names", "names"]
    assert heaviest(find_route(str(rules), model).rows(examples, texts=texts), experts) == [None, "names"]
    assert [name for name in ROUTES if find_route(name, model).block_gate("mood") is not None] == ["arrow"]


def test_a_gate_whose_weights_are_not_finite_is_named(pair):
    model = sparse_ft.load(pair, device="cpu")
    gate = model.checkpoint.model.gate
    gate.selection = replace(gate.selection, temperature=0.0)
    with pytest.raises(CheckpointError, match="gate gives weights that are NaN to the experts 'mood', 'names'"):
        model("Ada")
    assert model.predict(["Ada"], "mood")[0].tasks["mood"]["label"] in {"good", "bad"}
