"""Joint runs: experts and the gate that mixes them, learnt together, by text and by token."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from toy_checkpoints import add_random_expert, equal, tensors
from toys import JOINT, POOL, marked, run, settings, toy_rows, train_joint, write_toy

import sparse_ft
from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.checkpoint.manifest import read_manifest
from sparse_ft.config import GateConfig, load_config
from sparse_ft.errors import ConfigError
from sparse_ft.experts.gates import SequenceGate, TokenGate
from sparse_ft.experts.selection import Selection
from sparse_ft.training import joint as mixing
from sparse_ft.training.gradients import Gradients
from sparse_ft.training.joint import JointRouting
from sparse_ft.training.new_experts import token_gate

MIXED = ["mood", "about", "names"]
GATES = pytest.mark.parametrize("gate", ["token", "sequence"])
POOLS = pytest.mark.parametrize("pool", [{}, POOL], ids=["own", "pool"])


def small(folder, *names, **changes):
    """Write toy tasks of a few rows."""
    return [write_toy(folder, name, sizes=(16, 8, 8), **changes) for name in names]


@pytest.fixture(params=JOINT)
def mixture(request, joint_toys):
    return joint_toys(request.param)


def texts_of(number):
    """Texts of all toy tasks, of unlike lengths."""
    generator = random.Random(1)
    rows = [row for name in ("mood", "about") for row in toy_rows(name, number, seed=7)]
    texts = [row["text"] for row in rows] + [" ".join(row["tokens"]) for row in toy_rows("names", number, seed=7)]
    return [" ".join([text] * generator.choice([1, 1, 4])) for text in texts] + ["", "loved"]


def stacked(model, task, texts):
    """Logits of a task as one tensor, (texts or words, labels)."""
    found = model.logits(texts, task)
    return found if isinstance(found, torch.Tensor) else torch.cat(found)


# What is learnt


@pytest.mark.parametrize(("name", "metric", "least"), [
    ("mood", "accuracy", 0.8),  # 0.96 at least, over 10 tokenizers and 5 seeds; half by chance
    ("about", "accuracy", 0.45),  # 0.56; a quarter by chance
    ("names", "f1", 0.75),  # 0.89
])  # fmt: skip
def test_every_task_is_learnt(mixture, name, metric, least):
    assert json.loads((mixture / "metrics.json").read_text())[name]["metrics"][metric] >= least


def test_the_history_tells_what_the_gate_did(tmp_path, tiny_bert):
    result = train_joint(small(tmp_path, "mood", "names"), tiny_bert, tmp_path / "out", gate__type="token", **POOL)
    for entry in result.history:
        assert entry["auxiliary"].keys() == {"balance", "z", "routing", "dropped"}
        assert list(entry["usage"]) == ["pool-0", "pool-1", "pool-2", "pool-3"]  # not the one that all rows share
        assert sum(entry["usage"].values()) == pytest.approx(1, abs=1e-5)
        assert entry["auxiliary"]["routing"] == entry["auxiliary"]["dropped"] == 0
        assert entry["auxiliary"]["balance"] >= 0.9
        assert entry["validation"].keys() == {"mood", "names"}


@pytest.mark.parametrize(("workers", "rows", "parts"), [(1, 32, 1), (4, 32, 4), (16, 32, 4), (16, 9, 1)])
def test_parts_of_a_joint_batch_have_rows_enough_to_balance(tmp_path, tiny_bert, monkeypatch, workers, rows, parts):
    sizes, losses = [], Gradients._losses

    def counting(self, part, generator, *, batch):
        sizes.append(len(part))
        return losses(self, part, generator, batch=batch)

    monkeypatch.setattr(Gradients, "_losses", counting)
    task = write_toy(tmp_path, "mood", sizes=(rows, 4, 4))
    changes = {"train__epochs": 1, "train__batch_size": 32, "train__workers": workers, "gate__type": "token", **POOL}
    train_joint([task], tiny_bert, tmp_path / "out", **changes)
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


def test_one_mean_score_decides_which_state_of_all_is_best(tmp_path, tiny_bert, monkeypatch):
    from sparse_ft.training import loop as fitting

    scores = {"mood": [0.1, 0.5, 0.9], "about": [0.2, 0.9, 0.3]}  # on average the second epoch
    left, states = {name: iter(values) for name, values in scores.items()}, []
    score_rows, end_epoch = fitting.score_rows, fitting._Loop.end_epoch

    def scripted(spec, data, predictions):
        score = score_rows(spec, data, predictions)
        score.metrics[spec.metric] = next(left[spec.name])
        return score

    def watching(loop):
        states.append({name: value.detach().clone() for name, value in loop.group.parameters.items()})
        end_epoch(loop)

    monkeypatch.setattr(fitting, "score_rows", scripted)
    monkeypatch.setattr(fitting._Loop, "end_epoch", watching)
    tasks = small(tmp_path, "mood", "about")
    path = train_joint(tasks, tiny_bert, tmp_path / "out", train__epochs=3, gate__type="token").path
    gate = load_checkpoint(path).model.gate
    saved = [linear.weight for linear in gate.linears]
    assert all(torch.equal(weight, states[1][f"gate/gate.{place}.weight"]) for place, weight in enumerate(saved))
    assert not torch.equal(saved[0], states[2]["gate/gate.0.weight"])
    metrics = json.loads((path / "metrics.json").read_text())
    assert {name: metrics[name]["validation"] for name in scores} == {"mood": 0.5, "about": 0.9}


def test_a_gate_for_texts_is_fitted_before_and_stays_right(tmp_path, tiny_bert):
    tasks = [marked(tmp_path, name, sizes=(96, 32, 8)) for name in ("mood", "names")]
    path = train_joint(tasks, tiny_bert, tmp_path / "out", train__epochs=1).path
    metrics = json.loads((path / "metrics.json").read_text())
    assert all(metrics[name]["routing_accuracy"] > 0.75 for name in ("mood", "names"))
    assert load_checkpoint(path).model.gate.familiarity.fitted


def test_the_rows_of_a_token_run_teach_their_own_expert_to_the_gate(tmp_path, tiny_bert):
    tasks = [marked(tmp_path, name, sizes=(24, 8, 8)) for name in ("mood", "names")]
    changes = {"train__epochs": 4, "gate__type": "token", "gate__learning_rate": 0.03}
    taught = train_joint(tasks, tiny_bert, tmp_path / "taught", gate__routing_loss=1.0, **changes).history
    left = train_joint(tasks, tiny_bert, tmp_path / "left", gate__routing_loss=0.0, **changes).history
    assert taught[-1]["auxiliary"]["routing"] < 0.7 * taught[0]["auxiliary"]["routing"]  # half, with four seeds
    assert taught[-1]["auxiliary"]["routing"] < 0.7 * left[-1]["auxiliary"]["routing"]


def test_evaluate_scores_mixed_tasks_as_the_gate_mixes_them_and_otherwise_if_it_is_said(mixture):
    by_task, by_gate = (sparse_ft.evaluate(mixture, route=route, device="cpu") for route in ("task", "gate"))
    assert by_task.gated
    assert by_task.to_dict()["tasks"] == by_gate.to_dict()["tasks"]
    assert by_task.routing.usage == by_gate.routing.usage
    names = read_manifest(mixture)["gate"]["experts"]
    assert {name for used in by_task.routing.usage.values() for name in used} == set(names)
    assert all(sum(used.values()) == pytest.approx(1, abs=1e-4) for used in by_task.routing.usage.values())
    alone = sparse_ft.evaluate(mixture, route=names[0], tasks=["mood"], device="cpu")
    assert alone.routing.usage == {"mood": {names[0]: 1.0}}


# The gradient


@GATES
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_task_loss_alone_teaches_the_gate(tmp_path, tiny_bert, monkeypatch, gate, top_k):
    started, start = [], mixing.JointRouting.__init__

    def watch(self, model, *arguments, **options):
        started.append({name: value.clone() for name, value in model.gate.state_dict().items()})
        start(self, model, *arguments, **options)

    monkeypatch.setattr(mixing.JointRouting, "__init__", watch)
    alone = {f"gate__{name}_loss": 0.0 for name in ("balance", "z", "routing")}
    tasks = small(tmp_path, "mood", "about")
    options = {"gate__type": gate, "gate__top_k": top_k, "train__weight_decay": 0.0, "train__epochs": 1}
    path = train_joint(tasks, tiny_bert, tmp_path / "out", **alone, **options).path
    ended = load_checkpoint(path).model.gate.state_dict()
    moved = {name for name, value in started[0].items() if not torch.equal(ended[name], value)}
    linears = {name for name in ended if name.startswith(("linears.", "classifier."))}
    assert linears
    assert moved == linears


@pytest.fixture
def mixed(make_model):
    """A model of three random experts whose two tasks a gate mixes, and some rows of both."""
    model = make_model("bert", {"mood": ("text", 3), "names": ("word", 5)})
    add_random_expert(model, "third", seed=3)
    model.tasks = {name: replace(slot, joint=True) for name, slot in model.tasks.items()}
    return model


def rows_of(model):
    encoder = Encoder(model.backbone, max_length=64)
    texts = ["Book a table for two in Lisbon", "Ada", "then a weather of at six"]
    return {"mood": encoder.texts(texts), "names": encoder.words([text.split() for text in texts])}


def mixing_of(model, gate, config):
    """What a joint run would route with, over rows of both tasks in one batch."""
    if gate == "token":
        model.gate = TokenGate(
            model.experts.names, 32, blocks=[0, 1, 2], selection=Selection.from_settings(config, joint=True)
        )
        model.gate.initialise(torch.Generator().manual_seed(0))
    else:
        model.gate = SequenceGate(
            model.experts.names, 32, block=1, selection=Selection.from_settings(config, joint=True)
        )
        model.gate.initialise(torch.Generator().manual_seed(0))
    model.gate.requires_grad_(True)
    examples = rows_of(model)
    pairs = [(task, row) for task in examples for row in range(3)]
    batch = collate([(task, examples[task][row]) for task, row in pairs], pad_id=model.backbone.pad_id)
    return JointRouting(model, examples, run=load_config(values={"gate": config.model_dump()})), batch, pairs


@GATES
def test_with_one_expert_a_row_the_probability_is_its_weight_or_the_gate_would_learn_nothing(mixed, gate):
    choice = Selection.from_settings(GateConfig(top_k=1), joint=True)
    assert (choice.top_k, choice.normalise) == (1, False)
    gradients = []
    for normalise in (False, True):
        ours, batch, pairs = mixing_of(mixed, gate, GateConfig(top_k=1))
        ours.gate.selection = replace(choice, normalise=normalise)
        logits, _ = ours.forward(mixed, batch, pairs, generator=None)
        sum(value.square().sum() for value in logits.values()).backward()
        found = [value.grad for value in ours.gate.parameters() if value.grad is not None]
        gradients.append(max((gradient.abs().max().item() for gradient in found), default=0.0))
    assert gradients[0] > 1e-3
    assert gradients[1] < 1e-6 < gradients[0] / 100


def test_two_experts_are_mixed_by_default_at_weights_that_sum_to_one():
    choice = Selection.from_settings(GateConfig(jitter=0.1, capacity=2.0, top_p=0.9), joint=True)
    assert choice == Selection(top_k=2, normalise=True, jitter=0.1, capacity=2.0, top_p=0.9)


@GATES
def test_a_batch_in_parts_gives_the_same_answers_and_auxiliary_losses_on_average(mixed, gate):
    ours, batch, pairs = mixing_of(mixed, gate, GateConfig())
    whole, told = ours.forward(mixed, batch, pairs, generator=None)
    examples = rows_of(mixed)
    answers, z, tokens = {"mood": [], "names": []}, 0.0, 0
    for pair in pairs:
        part = collate([(pair[0], examples[pair[0]][pair[1]])], pad_id=mixed.backbone.pad_id)
        logits, alone = ours.forward(mixed, part, [pair], generator=None)
        answers[pair[0]].append(logits[pair[0]])
        count = int(part.attention_mask.sum()) if gate == "token" else 1
        z, tokens = z + count * alone.losses["z"], tokens + count
    for task, parts in answers.items():
        torch.testing.assert_close(torch.cat(parts), whole[task], atol=1e-5, rtol=1e-5)
    assert z / tokens == pytest.approx(told.losses["z"], rel=1e-4)


def test_targets_are_the_tasks_own_experts_and_none_in_a_pool(mixed):
    ours, _, _ = mixing_of(mixed, "token", GateConfig())
    assert ours.targets == {"mood": 0, "names": 1}
    mixed.tasks["mood"] = replace(mixed.tasks["mood"], experts=("mood", "third"))
    assert mixing_of(mixed, "token", GateConfig())[0].targets == {"mood": -100, "names": 1}


def test_capacity_drops_and_jitter_shakes_in_training_only(mixed):
    for gate, changes in ((GateConfig(capacity=0.5), True), (GateConfig(jitter=0.3), True), (GateConfig(), False)):
        ours, batch, pairs = mixing_of(mixed, "sequence", gate)
        mixed.train()
        torch.manual_seed(0)
        first, told = ours.forward(mixed, batch, pairs, generator=None)
        mixed.eval()
        plain = mixed(
            batch,
            routing=mixed.reindexed(
                ours.gate.decide(torch.stack([ours.means[t][r] for t, r in pairs])), ours.gate.names
            ),
        )
        assert (told.losses["dropped"] > 0) == (gate.capacity is not None)
        assert (not torch.allclose(first["mood"], plain["mood"], atol=1e-5)) == changes


# Collapse


@pytest.mark.parametrize("pool", [{}, {"experts__pool": 3}], ids=["own", "pool"])
def test_a_gate_that_collapses_raises_the_alarm(tmp_path, tiny_bert, monkeypatch, caplog, pool):
    def same_for_all(self, generator):
        with torch.no_grad():
            for linear in self.linears:
                linear.weight.zero_()  # all logits are equal, so every token chooses the same one

    monkeypatch.setattr(TokenGate, "initialise", same_for_all)
    options = {"gate__type": "token", "gate__top_k": 1, "gate__learning_rate": 1e-12, "train__epochs": 1}
    result = train_joint(small(tmp_path, "mood", "about", "names"), tiny_bert, tmp_path / "out", **options, **pool)
    assert sorted(result.history[0]["usage"].values()) == pytest.approx([0, 0, 1], abs=1e-6)
    alarms = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Epoch 1: Expert")]
    assert sum("it is hardly used" in alarm for alarm in alarms) == 2
    assert sum("the gate collapses" in alarm for alarm in alarms) == (1 if pool else 0)


def test_a_gate_that_uses_all_experts_raises_none(tmp_path, tiny_bert, caplog):
    train_joint(small(tmp_path, "mood", "names"), tiny_bert, tmp_path / "out", gate__type="token", experts__pool=2)
    assert "hardly used" not in caplog.text
    assert "collapses" not in caplog.text


# The same numbers again


@pytest.mark.parametrize(("gate", "workers"), [("token", 3), ("sequence", 1)])
def test_the_seed_decides_every_bit(tmp_path, tiny_bert, gate, workers):
    options = {"gate__type": gate, "gate__jitter": 0.1, "experts__dropout": 0.1, "train__workers": workers, **POOL}
    options["train__epochs"] = 1
    tasks = small(tmp_path, "mood", "names")
    first, again, other = (
        tensors(train_joint(tasks, tiny_bert, tmp_path / name, seed=seed, **options).path)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first.keys() == again.keys() == other.keys()
    learnt = [
        name for name in first if not name.endswith("block") and (not name.startswith("gate") or "linear" in name)
    ]
    assert not any(torch.equal(first[name], other[name]) for name in learnt)


@GATES
@POOLS
def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path, tiny_bert, caught, gate, pool):
    path = train_joint(small(tmp_path, "mood", "names"), tiny_bert, tmp_path / "out", gate__type=gate, **pool).path
    model = sparse_ft.load(path, device="cpu")
    texts, saved = texts_of(4), caught[0]
    for task in ("mood", "names"):
        now = stacked(model, task, texts)
        model.checkpoint.model, loaded = saved, model.checkpoint.model
        then = stacked(model, task, texts)
        model.checkpoint.model = loaded
        assert torch.equal(now, then)
    slot = loaded.tasks["mood"]
    assert slot.joint
    assert slot.shared == ("shared" if pool else None)
    assert slot.experts == (("pool-0", "pool-1", "pool-2", "pool-3") if pool else ("mood",))
    assert read_manifest(path)["gate"]["experts"] == (list(slot.experts) if pool else ["mood", "names"])


@pytest.fixture
def caught(monkeypatch):
    """The models as they are when checkpoints are written."""
    from sparse_ft.training import train as training

    models, save = [], training.save_checkpoint

    def catch(path, *, model, **rest):
        models.append(model)
        save(path, model=model, **rest)

    monkeypatch.setattr(training, "save_checkpoint", catch)
    return models


def test_a_new_process_gives_the_same_logits(tmp_path, joint_toys):
    texts, paths = texts_of(5), [joint_toys(kind) for kind in JOINT]
    script = """
import sys, torch, sparse_ft
torch.set_num_threads(1)
out, *rest = sys.argv[1:]
models = [sparse_ft.load(path, device="cpu") for path in rest[:2]]
torch.save([logits for model in models for task in ("mood", "names") for logits in model.logits(rest[2:], task)], out)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "logits"), *map(str, paths), *texts]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    models = [sparse_ft.load(path, device="cpu") for path in paths]
    expected = [logits for model in models for task in ("mood", "names") for logits in model.logits(texts, task)]
    found = torch.load(tmp_path / "logits")
    assert len(found) == len(expected) == 4 * len(texts)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("task", ["mood", "names"])
def test_a_text_gets_the_same_answer_in_any_batch_order_and_number_of_threads(mixture, monkeypatch, task):
    model, texts = sparse_ft.load(mixture, device="cpu"), texts_of(8)
    expected = [stacked(model, task, [text]) for text in texts]
    order = random.Random(3).sample(range(len(texts)), len(texts))
    for max_tokens, threads in ((60, 1), (4096, 1), (4096, 3)):
        monkeypatch.setattr("sparse_ft.backbone.batching.MAX_TOKENS", max_tokens)
        torch.set_num_threads(threads)
        try:
            found = model.logits([texts[place] for place in order], task)
        finally:
            torch.set_num_threads(1)
        for place, row in zip(order, found, strict=True):
            torch.testing.assert_close(row.view(expected[place].shape), expected[place], atol=1e-5, rtol=1e-5)


# Which experts learn


def test_the_experts_of_a_pool_share_their_a_and_nothing_else(tmp_path, tiny_bert):
    tasks = small(tmp_path, "mood", "names")
    options = {"gate__type": "token", "experts__pool": 3, "experts__shared": True, "train__weight_decay": 0.1}
    tied = load_checkpoint(
        train_joint(tasks, tiny_bert, tmp_path / "tied", experts__shared_a=True, **options).path
    ).model
    apart = load_checkpoint(train_joint(tasks, tiny_bert, tmp_path / "apart", **options).path).model
    first, *others = [tied.experts.get(f"pool-{place}").deltas for place in range(3)]
    for module, (lora_a, lora_b) in first.items():
        assert all(torch.equal(lora_a, other[module][0]) for other in others)
        assert not any(torch.equal(lora_b, other[module][1]) for other in others)
        assert not torch.equal(lora_a, tied.experts.get("shared").deltas[module][0])
        separate = [apart.experts.get(f"pool-{place}").deltas[module][0] for place in range(3)]
        assert not torch.equal(separate[0], separate[1])
    again = train_joint([], None, tmp_path / "again", start=tmp_path / "tied", experts__shared_a=True, **options)
    further = load_checkpoint(again.path).model
    pairs = [[further.experts.get(f"pool-{place}").deltas[module][0] for module in first] for place in range(3)]
    assert all(torch.equal(left, right) for left, right in zip(pairs[0], pairs[2], strict=True))
    assert not torch.equal(pairs[0][0], next(iter(first.values()))[0])
    with pytest.raises(ConfigError, match=r"'pool-0' and 'pool-1' of .* were trained without experts\.shared_a"):
        train_joint([], None, tmp_path / "no", start=tmp_path / "apart", experts__pool=3, experts__shared_a=True)
    assert not (tmp_path / "no").exists()


@GATES
@POOLS
def test_tasks_that_are_not_trained_answer_as_before(tmp_path, tiny_bert, gate, pool):
    old = run(small(tmp_path, "mood", "about"), tiny_bert, tmp_path / "old", train__epochs=1).path
    before = sparse_ft.load(old, device="cpu")
    new = train_joint(small(tmp_path, "names"), None, tmp_path / "new", start=old, gate__type=gate, **pool).path
    after = sparse_ft.load(new, device="cpu")
    for name in ("mood", "about"):
        for file in (f"experts/{name}/adapter_model.safetensors", f"heads/{name}.safetensors"):
            assert (old / file).read_bytes() == (new / file).read_bytes()
        assert torch.equal(before.logits(texts_of(4), name), after.logits(texts_of(4), name))
    slots = after.checkpoint.model.tasks
    assert {name: slot.joint for name, slot in slots.items()} == {"mood": False, "about": False, "names": True}
    assert after.checkpoint.model.gate.names == (list(slots["names"].experts) if pool else ["mood", "about", "names"])


@pytest.mark.parametrize("first_block", [0, 2])
@GATES
def test_what_comes_later_leaves_mixed_tasks_as_they_were(tmp_path, tiny_bert, caplog, gate, first_block):
    caplog.set_level("INFO", "sparse_ft")
    tasks = small(tmp_path, "mood", "about")
    options = {"gate__type": gate, "experts__pool": 3, "experts__shared": True, "experts__first_block": 1}
    old = train_joint(tasks, tiny_bert, tmp_path / "old", **options).path
    new = sparse_ft.train(
        small(tmp_path, "names"),
        from_checkpoint=old,
        output=tmp_path / "new",
        overrides=settings(experts__first_block=first_block, experts__rank=3),
        device="cpu",
    ).path
    before, after = sparse_ft.load(old, device="cpu"), sparse_ft.load(new, device="cpu")
    for name in ("mood", "about"):
        assert torch.equal(before.logits(texts_of(4), name), after.logits(texts_of(4), name))
    assert "The gate stays as it is, because task mood was trained with it" in caplog.text
    assert (old / "gate.safetensors").read_bytes() == (new / "gate.safetensors").read_bytes()
    assert not after.checkpoint.model.tasks["names"].gated


def test_without_tasks_all_of_a_checkpoint_are_trained_on_the_data_they_had(tmp_path, tiny_bert):
    files = {"format": "jsonl", **{split: f"{split}.jsonl" for split in ("train", "validation", "test")}}
    tasks = small(tmp_path, "mood", "about", files=files)
    data = {name: str(tmp_path / name) for name in ("mood", "about")}
    old = sparse_ft.train(
        tasks, data=data, backbone=str(tiny_bert), output=tmp_path / "old", overrides=settings(), device="cpu"
    ).path
    result = train_joint([], None, tmp_path / "new", start=old, gate__type="token")
    assert list(result.tasks) == ["mood", "about"]
    checkpoint = load_checkpoint(result.path)
    assert checkpoint.config.sources == data
    assert all(slot.joint for slot in checkpoint.model.tasks.values())
    before, after = tensors(old), tensors(result.path)
    learnt = {name for name in before if not name.startswith("gate")}
    assert not any(torch.equal(before[name], after[name]) for name in learnt)
    again = train_joint([], None, tmp_path / "again", start=result.path, gate__type="token").path
    assert not torch.equal(
        after["gate.safetensors:linears.0.weight"], tensors(again)["gate.safetensors:linears.0.weight"]
    )


def test_some_of_the_tasks_that_one_gate_mixes_cannot_be_trained_alone(tmp_path, tiny_bert):
    tasks = small(tmp_path, "mood", "about")
    old = train_joint(tasks, tiny_bert, tmp_path / "old", train__epochs=1, experts__pool=2).path
    message = r"Task 'about' of .* is answered through the same gate, .* add --task (.*about\.yaml), or leave --task"
    with pytest.raises(ConfigError, match=message):
        train_joint(tasks[:1], None, tmp_path / "new", start=old, train__epochs=1)
    assert not (tmp_path / "new").exists()
    named = [tasks[0], *small(tmp_path, "names"), str(old / "tasks/about.yaml")]
    result = train_joint(named, None, tmp_path / "new", start=old, train__epochs=1)
    model = load_checkpoint(result.path).model
    assert model.gate.names == ["pool-0", "pool-1", "names"]
    assert model.tasks["names"].experts == ("names",)


def test_an_expert_of_one_task_does_not_become_one_that_tasks_share(tmp_path, tiny_bert):
    (about,) = small(tmp_path, "about")
    own = write_toy(tmp_path, "mood", sizes=(16, 8, 8), as_name="shared")
    old = run([own], tiny_bert, tmp_path / "old", train__epochs=1).path
    with pytest.raises(
        ConfigError, match=r"expert 'shared' of .* serves task 'shared', .* edit .*old --rename shared="
    ):
        train_joint([about], None, tmp_path / "new", start=old, experts__pool=2, experts__shared=True)
    assert not (tmp_path / "new").exists()


def test_a_joint_run_goes_on_from_a_gate_of_prototypes_with_one_that_learns(tmp_path, tiny_bert):
    tasks = small(tmp_path, "mood", "names")
    old = run(tasks, tiny_bert, tmp_path / "old", train__epochs=1, gate__type="prototype").path
    assert read_manifest(old)["gate"]["type"] == "prototype"
    new = train_joint([], None, tmp_path / "new", start=old, train__epochs=1).path
    assert read_manifest(new)["gate"]["type"] == "sequence"


@pytest.mark.parametrize(("experts", "changes", "expected"), [
    (17, {}, 4),
    (17, {"top_k": 6}, 6),
    (17, {"shortlist": 5}, 5),
    (17, {"capacity": 2.0}, None),
    (16, {}, None),
    (3, {"shortlist": 2}, 2),
])  # fmt: skip
def test_many_experts_get_a_shortlist_unless_it_is_said_otherwise(mixed, experts, changes, expected):
    names = [f"e{place}" for place in range(experts)]
    assert token_gate(mixed, names, settings=GateConfig(**changes), seed=1).shortlist == expected


def test_a_gate_for_tokens_goes_on_for_the_same_experts_and_begins_anew_for_others(mixed):
    names = mixed.experts.names
    mixed.gate = token_gate(mixed, names, settings=GateConfig(), seed=1)
    weight, further = mixed.gate.linears[0].weight, GateConfig(top_k=1, jitter=0.1)
    gate = token_gate(mixed, names, settings=further, seed=2)
    assert torch.equal(gate.linears[0].weight, weight)
    assert (gate.selection.top_k, gate.selection.jitter) == (1, 0.1)
    assert not torch.equal(token_gate(mixed, names[::-1], settings=further, seed=2).linears[0].weight, weight)


# Other families


def test_a_causal_backbone_mixes_by_token(tmp_path, tiny_gpt2):
    path = train_joint(small(tmp_path, "mood", "about"), tiny_gpt2, tmp_path / "out", gate__type="token", **POOL).path
    model, texts = sparse_ft.load(path, device="cpu"), [*texts_of(6), "", " "]
    together = model.logits(texts, "mood")
    alone = torch.cat([model.logits([text], "mood") for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.isfinite().all()
    assert together.std(0).min() > 1e-3
    usage = [model.predict([text], "mood")[0].routing for text in ("", "the table loved")]
    assert [sum(weight for name, weight in row.items() if name != "shared") for row in usage] == pytest.approx([1, 1])


def test_a_family_that_shares_attention_between_rows_mixes_by_text_and_not_by_token(tmp_path, tiny_folder):
    tasks, backbone = small(tmp_path, "mood", "about"), tiny_folder("deberta-v2")
    with pytest.raises(ConfigError, match=r"cannot be routed one by one: .*Route whole texts"):
        train_joint(tasks, backbone, tmp_path / "no", gate__type="token")
    assert not (tmp_path / "no").exists()
    model = sparse_ft.load(train_joint(tasks, backbone, tmp_path / "out", train__epochs=1, **POOL).path, device="cpu")
    texts = texts_of(3)
    together = model.logits(texts, "mood")
    alone = torch.cat([model.logits([text], "mood") for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_an_expert_that_serves_another_task_too_is_not_trained_without_it(tmp_path, tiny_bert):
    tasks = small(tmp_path, "mood", "about")
    path = train_joint(tasks, tiny_bert, tmp_path / "out", experts__pool=1, train__epochs=1).path
    message = "The expert 'pool-0' of task 'mood' in .* also serves task 'about', whose answers would change"
    for stage in ("experts", "joint"):
        with pytest.raises(ConfigError, match=message):
            sparse_ft.train(tasks[:1], from_checkpoint=path, output=tmp_path / "new", stage=stage, device="cpu")
    both = sparse_ft.train(
        tasks, from_checkpoint=path, output=tmp_path / "new", overrides=settings(train__epochs=1), device="cpu"
    )
    assert set(both.tasks) == {"mood", "about"}


def test_the_parts_of_a_batch_hold_of_every_task_what_the_batch_does(mixed):
    pairs = [("mood", place) for place in range(8)] + [("names", place) for place in range(4)]
    joint, alone = (
        Gradients(
            mixed, {}, parameters=[], run=load_config(values={"stage": stage}), accelerator=Accelerator(cpu=True)
        )._parts(pairs, 4)
        for stage in ("joint", "experts")
    )
    assert [sum(task == "mood" for task, _ in part) for part in joint] == [2, 2, 2, 2]
    assert sorted(pair for part in joint for pair in part) == pairs
    assert [pair for part in alone for pair in part] == pairs


def test_a_pool_of_one_is_an_expert_that_all_tasks_share_without_a_gate(tmp_path, tiny_bert):
    first = run(small(tmp_path, "mood", "about"), tiny_bert, tmp_path / "out", experts__pool=1)
    further = sparse_ft.train(
        from_checkpoint=first.path,
        stage="joint",
        output=tmp_path / "further",
        overrides=settings(experts__pool=1),
        device="cpu",
    )
    for result in (first, further):
        model = load_checkpoint(result.path).model
        assert model.gate is None
        assert model.experts.names == ["pool-0"]
        assert {(slot.experts, slot.gated) for slot in model.tasks.values()} == {(("pool-0",), False)}
        assert not any("usage" in epoch for epoch in result.history)
    assert not equal(tensors(first.path), tensors(further.path))


def further(tasks, output, *, start, **changes):
    """Train tasks of a checkpoint further, each alone."""
    return sparse_ft.train(
        tasks, from_checkpoint=start, output=output, overrides=settings(**changes), device="cpu"
    ).path


@pytest.mark.parametrize("stage", ["experts", "joint"])
def test_a_frozen_expert_stays_while_its_task_learns(tmp_path, tiny_bert, stage):
    old = run(small(tmp_path, "mood", "about"), tiny_bert, tmp_path / "old", train__epochs=1).path
    before, options = tensors(old), {"experts__frozen": ["mood"], "train__epochs": 1}
    if stage == "joint":
        new = train_joint([], None, tmp_path / "new", start=old, gate__type="token", **options).path
    else:
        new = further(["mood", "about"], tmp_path / "new", start=old, **options)
    after = tensors(new)
    for name in [name for name in before if not name.startswith("gate")]:
        assert torch.equal(before[name], after[name]) is name.startswith("experts/mood/"), name


def test_two_tasks_may_read_one_frozen_expert(tmp_path, tiny_bert):
    """What is refused as long as the expert learns, for the answers of the other task would change."""
    tasks = small(tmp_path, "mood", "about")
    old = run(tasks, tiny_bert, tmp_path / "old", train__epochs=1, experts__pool=1).path
    expert = load_checkpoint(old).model.tasks["mood"].experts[0]
    with pytest.raises(ConfigError, match=f"The expert '{expert}' of task 'mood' .* also serves task 'about'"):
        further(["mood"], tmp_path / "new", start=old)
    new = further(["mood"], tmp_path / "new", start=old, experts__frozen=[expert])
    texts = texts_of(4)
    loaded = [sparse_ft.load(path, device="cpu") for path in (old, new)]
    assert torch.equal(*(model.logits(texts, "about") for model in loaded))
    assert not torch.equal(*(model.logits(texts, "mood") for model in loaded))
