"""Joint runs: experts and the gate that mixes them, learnt together, by text and by token."""

import json
import random
from dataclasses import replace

import pytest
import torch
from toy_checkpoints import add_random_expert, equal, saved, saved_joint, tensors
from toys import JOINT, POOL, marked, run, settings, toy_rows, train_joint, write_toy

import sparse_ft
from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.manifest import read_manifest
from sparse_ft.config import GateConfig, load_config
from sparse_ft.errors import ConfigError
from sparse_ft.experts.gates import SequenceGate, TokenGate
from sparse_ft.experts.selection import Selection
from sparse_ft.merging.edit import edit
from sparse_ft.training import train as training
from sparse_ft.training.gradients import Gradients
from sparse_ft.training.joint import JointRouting
from sparse_ft.training.new_experts import token_gate

GATES = pytest.mark.parametrize("gate", ["token", "sequence"])


def small(folder, *names, **changes):
    """Write toy tasks of a few rows."""
    return [write_toy(folder, name, sizes=(16, 4, 4), **changes) for name in names]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, make_model):
    """A checkpoint of three tasks with random experts of their own; read-only."""
    return saved(tmp_path_factory.mktemp("untrained"), make_model, "bert")


@pytest.fixture
def shared(untrained, tmp_path):
    """A checkpoint in which two tasks share the expert 'mood'."""
    loaded = load_checkpoint(untrained)
    loaded.model.tasks["about"] = replace(loaded.model.tasks["about"], experts=("mood",))
    loaded.model.experts.remove("about")
    target = tmp_path / "shared"
    save_checkpoint(target, model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics={})
    return target


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


@pytest.mark.parametrize(("workers", "rows", "parts"), [(16, 32, 4), (16, 9, 1)])
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
    assert all(torch.equal(weight, states[1][f"gate/gate.{index}.weight"]) for index, weight in enumerate(saved))
    assert not torch.equal(saved[0], states[2]["gate/gate.0.weight"])
    metrics = json.loads((path / "metrics.json").read_text())
    assert {name: metrics[name]["validation"] for name in scores} == {"mood": 0.5, "about": 0.9}


def test_a_gate_for_texts_is_fitted_before_and_stays_right(tmp_path, tiny_bert):
    tasks = [marked(tmp_path, name, sizes=(48, 16, 8)) for name in ("mood", "names")]
    path = train_joint(tasks, tiny_bert, tmp_path / "out", train__epochs=1).path
    metrics = json.loads((path / "metrics.json").read_text())
    assert all(metrics[name]["routing_accuracy"] > 0.75 for name in ("mood", "names"))
    assert load_checkpoint(path).model.gate.familiarity.fitted


def test_the_rows_of_a_token_run_teach_their_own_expert_to_the_gate(tmp_path, tiny_bert):
    tasks = [marked(tmp_path, name, sizes=(24, 4, 4)) for name in ("mood", "names")]
    changes = {"train__epochs": 4, "gate__type": "token", "gate__learning_rate": 0.03, "gate__routing_loss": 1.0}
    history = train_joint(tasks, tiny_bert, tmp_path / "out", **changes).history
    losses = [epoch["auxiliary"]["routing"] for epoch in history]
    assert losses[-1] < 0.7 * losses[0]  # half, with four seeds


def test_evaluate_scores_mixed_tasks_as_the_gate_mixes_them_and_otherwise_if_it_is_said(mixture):
    by_task, by_gate = (sparse_ft.evaluate(mixture, route=route, device="cpu") for route in ("task", "gate"))
    assert by_task.gated
    assert by_task.to_dict()["tasks"] == by_gate.to_dict()["tasks"]
    assert by_task.routing.usage == by_gate.routing.usage
    names = read_manifest(mixture).gate.experts
    assert {name for used in by_task.routing.usage.values() for name in used} == set(names)
    assert all(sum(used.values()) == pytest.approx(1, abs=1e-4) for used in by_task.routing.usage.values())
    alone = sparse_ft.evaluate(mixture, route=names[0], tasks=["mood"], device="cpu")
    assert alone.routing.usage == {"mood": {names[0]: 1.0}}


# The gradient


@pytest.mark.parametrize(("gate", "top_k"), [("token", 1), ("sequence", 2)])
def test_the_task_loss_alone_teaches_the_gate(tmp_path, tiny_bert, monkeypatch, gate, top_k):
    started, start = [], JointRouting.__init__

    def watch(self, model, *arguments, **options):
        started.append({name: value.clone() for name, value in model.gate.state_dict().items()})
        start(self, model, *arguments, **options)

    monkeypatch.setattr(JointRouting, "__init__", watch)
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


def routing_of(model, gate, config):
    """The routing of a joint run, and a batch of rows of both tasks."""
    selection = Selection.from_settings(config, joint=True)
    if gate == "token":
        model.gate = TokenGate(model.experts.names, 32, blocks=[0, 1, 2], selection=selection)
    else:
        model.gate = SequenceGate(model.experts.names, 32, block=1, selection=selection)
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
        ours, batch, pairs = routing_of(mixed, gate, GateConfig(top_k=1))
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
    ours, batch, pairs = routing_of(mixed, gate, GateConfig())
    logits_of_all, report = ours.forward(mixed, batch, pairs, generator=None)
    examples = rows_of(mixed)
    answers, z, tokens = {"mood": [], "names": []}, 0.0, 0
    for pair in pairs:
        part = collate([(pair[0], examples[pair[0]][pair[1]])], pad_id=mixed.backbone.pad_id)
        logits, alone = ours.forward(mixed, part, [pair], generator=None)
        answers[pair[0]].append(logits[pair[0]])
        count = int(part.attention_mask.sum()) if gate == "token" else 1
        z, tokens = z + count * alone.losses["z"], tokens + count
    for task, parts in answers.items():
        torch.testing.assert_close(torch.cat(parts), logits_of_all[task], atol=1e-5, rtol=1e-5)
    assert z / tokens == pytest.approx(report.losses["z"], rel=1e-4)


def test_targets_are_the_tasks_own_experts_and_none_in_a_pool(mixed):
    ours, _, _ = routing_of(mixed, "token", GateConfig())
    assert ours.targets == {"mood": 0, "names": 1}
    mixed.tasks["mood"] = replace(mixed.tasks["mood"], experts=("mood", "third"))
    assert routing_of(mixed, "token", GateConfig())[0].targets == {"mood": -100, "names": 1}


def test_capacity_drops_and_jitter_shakes_in_training_only(mixed):
    for gate, changes in ((GateConfig(capacity=0.5), True), (GateConfig(jitter=0.3), True), (GateConfig(), False)):
        ours, batch, pairs = routing_of(mixed, "sequence", gate)
        mixed.train()
        torch.manual_seed(0)
        first, report = ours.forward(mixed, batch, pairs, generator=None)
        mixed.eval()
        plain = mixed(
            batch,
            routing=mixed.reindexed(
                ours.gate.decide(torch.stack([ours.means[t][r] for t, r in pairs])), ours.gate.names
            ),
        )
        assert (report.losses["dropped"] > 0) == (gate.capacity is not None)
        assert (not torch.allclose(first["mood"], plain["mood"], atol=1e-5)) == changes


# Use of the experts


@pytest.mark.parametrize("collapsed", [False, True])
def test_the_history_tells_what_the_gate_did_and_a_collapse_raises_the_alarm(
    tmp_path, tiny_bert, monkeypatch, caplog, collapsed
):
    def same_for_all(self, generator):
        with torch.no_grad():
            for linear in self.linears:
                linear.weight.zero_()  # all logits are equal, so every token chooses the same one

    options = {"gate__type": "token", "train__epochs": 1, **POOL, "experts__pool": 3 if collapsed else 2}
    if collapsed:
        monkeypatch.setattr(TokenGate, "initialise", same_for_all)
        options |= {"gate__top_k": 1, "gate__learning_rate": 1e-12}
    (entry,) = train_joint(small(tmp_path, "mood", "names"), tiny_bert, tmp_path / "out", **options).history
    assert entry["auxiliary"].keys() == {"balance", "z", "routing", "dropped"}
    assert entry["auxiliary"]["routing"] == entry["auxiliary"]["dropped"] == 0
    assert entry["auxiliary"]["balance"] >= 0.9
    assert set(entry["usage"]) <= {"pool-0", "pool-1", "pool-2"}  # not the one that all rows share
    assert sum(entry["usage"].values()) == pytest.approx(1, abs=1e-5)
    assert entry["validation"].keys() == {"mood", "names"}
    alarms = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Epoch 1: Expert")]
    assert sum("hardly used" in alarm for alarm in alarms) == (2 if collapsed else 0)
    assert sum("collapses" in alarm for alarm in alarms) == (1 if collapsed else 0)


# The same numbers again


def test_the_seed_decides_every_bit(tmp_path, tiny_bert):
    options = {"gate__type": "token", "gate__jitter": 0.1, "experts__dropout": 0.1, "train__workers": 3, **POOL}
    tasks = small(tmp_path, "mood", "names")
    first, again, other = (
        tensors(train_joint(tasks, tiny_bert, tmp_path / name, seed=seed, train__epochs=1, **options).path)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert equal(first, again)
    learnt = [
        name for name in first if not name.endswith("block") and (not name.startswith("gate") or "linear" in name)
    ]
    assert not any(torch.equal(first[name], other[name]) for name in learnt)


@pytest.mark.parametrize(("gate", "pool"), [("token", POOL), ("sequence", {})])
def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path, tiny_bert, monkeypatch, gate, pool):
    models, save = [], training.save_checkpoint
    monkeypatch.setattr(
        training,
        "save_checkpoint",
        lambda path, *, model, **rest: (models.append(model), save(path, model=model, **rest)),
    )
    options = {"gate__type": gate, "train__epochs": 1, **pool}
    path = train_joint(small(tmp_path, "mood", "names"), tiny_bert, tmp_path / "out", **options).path
    model, texts = sparse_ft.load(path, device="cpu"), texts_of(4)
    now = [stacked(model, task, texts) for task in ("mood", "names")]
    slot = model.checkpoint.model.tasks["mood"]
    model.checkpoint.model = models[0]
    for task, logits in zip(("mood", "names"), now, strict=True):
        assert torch.equal(logits, stacked(model, task, texts))
    assert slot.joint
    assert slot.shared == ("shared" if pool else None)
    assert slot.experts == (("pool-0", "pool-1", "pool-2", "pool-3") if pool else ("mood",))
    assert read_manifest(path).gate.experts == (list(slot.experts) if pool else ["mood", "names"])


# From a checkpoint: which experts learn


def test_the_experts_of_a_pool_share_their_a_and_nothing_else(tmp_path, tiny_bert):
    tasks = small(tmp_path, "mood", "names")
    options = {"gate__type": "token", "experts__pool": 3, "experts__shared": True, "train__epochs": 1}
    tied = train_joint(tasks, tiny_bert, tmp_path / "tied", experts__shared_a=True, **options).path
    train_joint(tasks, tiny_bert, tmp_path / "apart", **options)
    experts = load_checkpoint(tied).model.experts
    first, *others = [experts.get(f"pool-{number}").deltas for number in range(3)]
    for module, (lora_a, lora_b) in first.items():
        assert all(torch.equal(lora_a, other[module][0]) for other in others)
        assert not any(torch.equal(lora_b, other[module][1]) for other in others)
        assert not torch.equal(lora_a, experts.get("shared").deltas[module][0])
    again = train_joint([], None, tmp_path / "again", start=tied, experts__shared_a=True, **options).path
    experts = load_checkpoint(again).model.experts
    pairs = [[experts.get(f"pool-{number}").deltas[module][0] for module in first] for number in (0, 2)]
    assert all(torch.equal(left, right) for left, right in zip(*pairs, strict=True))
    assert not torch.equal(pairs[0][0], next(iter(first.values()))[0])
    with pytest.raises(ConfigError, match=r"'pool-0' and 'pool-1' .*experts\.shared_a"):
        train_joint([], None, tmp_path / "no", start=tmp_path / "apart", experts__pool=3, experts__shared_a=True)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("gate", "pool"), [("token", POOL), ("sequence", {})])
def test_tasks_that_are_not_trained_answer_as_before(tmp_path, untrained, gate, pool):
    before = sparse_ft.load(untrained, device="cpu")
    (task,) = small(tmp_path, "mood", as_name="feeling")
    options = {"gate__type": gate, "train__epochs": 1, **pool}
    new = train_joint([task], None, tmp_path / "new", start=untrained, **options).path
    after = sparse_ft.load(new, device="cpu")
    for name in before.tasks:
        for file in (f"experts/{name}/adapter_model.safetensors", f"heads/{name}.safetensors"):
            assert (untrained / file).read_bytes() == (new / file).read_bytes()
        assert torch.equal(stacked(before, name, texts_of(4)), stacked(after, name, texts_of(4)))
    model = after.checkpoint.model
    assert {name for name, slot in model.tasks.items() if slot.joint} == {"feeling"}
    assert model.gate.names == (list(model.tasks["feeling"].experts) if pool else list(model.tasks))


@pytest.mark.parametrize(("gate", "first_block"), [("token", 2), ("sequence", 0)])
def test_a_later_task_leaves_joint_tasks_as_they_were(tmp_path, make_model, caplog, gate, first_block):
    caplog.set_level("INFO", "sparse_ft")
    old = saved_joint(gate, tmp_path / "old", make_model)
    new = sparse_ft.train(
        small(tmp_path, "mood", as_name="feeling"),
        from_checkpoint=old,
        output=tmp_path / "new",
        overrides=settings(experts__first_block=first_block, experts__rank=3, train__epochs=1),
        device="cpu",
    ).path
    before, after = sparse_ft.load(old, device="cpu"), sparse_ft.load(new, device="cpu")
    for name in ("mood", "about"):
        assert torch.equal(before.logits(texts_of(4), name), after.logits(texts_of(4), name))
    assert "The gate stays as it is" in caplog.text
    assert (old / "gate.safetensors").read_bytes() == (new / "gate.safetensors").read_bytes()
    assert not after.checkpoint.model.tasks["feeling"].gated


def test_without_tasks_all_of_a_checkpoint_are_trained_on_the_data_they_had(tmp_path, untrained):
    result = train_joint([], None, tmp_path / "new", start=untrained, gate__type="token", train__epochs=1)
    checkpoint = load_checkpoint(result.path)
    assert list(result.tasks) == ["mood", "about", "names"]
    assert checkpoint.config.sources == load_checkpoint(untrained).config.sources
    assert all(slot.joint for slot in checkpoint.model.tasks.values())
    before, after = tensors(untrained), tensors(result.path)
    changed = {name.split("/")[1].partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(result.tasks)


def test_a_joint_run_goes_on_from_a_gate_of_prototypes_with_one_that_learns(tmp_path, untrained):
    options = {"from_checkpoint": untrained, "stage": "gate", "overrides": ["gate.type=prototype"], "device": "cpu"}
    old = sparse_ft.train(output=tmp_path / "old", **options).path
    assert read_manifest(old).gate.type == "prototype"
    new = train_joint([], None, tmp_path / "new", start=old, train__epochs=1).path
    assert read_manifest(new).gate.type == "sequence"


@pytest.mark.parametrize("stage", ["experts", "joint"])
def test_a_frozen_expert_stays_while_its_task_learns(tmp_path, untrained, stage):
    options = {
        "experts__frozen": ["mood"],
        "train__epochs": 1,
        "gate__type": "token" if stage == "joint" else "sequence",
    }
    new = sparse_ft.train(
        ["mood", "about", "names"], from_checkpoint=untrained, output=tmp_path / "new",
        overrides=settings(**options), stage=stage, device="cpu",
    ).path  # fmt: skip
    before, after = tensors(untrained), tensors(new)
    for name in [name for name in before if name.endswith("lora_B.weight") or name.startswith("heads/")]:
        assert torch.equal(before[name], after[name]) is name.startswith("experts/mood/"), name


def test_an_expert_of_two_tasks_learns_from_both_or_is_frozen(tmp_path, untrained, shared):
    short = {"from_checkpoint": shared, "device": "cpu"}
    for stage in ("experts", "joint"):
        with pytest.raises(ConfigError, match=r"'mood' of task 'mood' .* 'about'"):
            sparse_ft.train(["mood"], output=tmp_path / "new", stage=stage, **short)
    renamed = edit(untrained, rename=[("mood", "shared")], output=tmp_path / "renamed").path
    tasks = small(tmp_path, "about", as_name="theme")
    with pytest.raises(ConfigError, match=r"'shared' of .* --rename shared="):
        train_joint(tasks, None, tmp_path / "new", start=renamed, experts__pool=2, experts__shared=True)
    assert not (tmp_path / "new").exists()
    options = settings(train__epochs=1, experts__frozen=["mood"])
    new = sparse_ft.train(["mood"], output=tmp_path / "new", overrides=options, **short).path
    loaded, texts = [sparse_ft.load(path, device="cpu") for path in (shared, new)], texts_of(4)
    assert torch.equal(*(model.logits(texts, "about") for model in loaded))
    assert not torch.equal(*(model.logits(texts, "mood") for model in loaded))


def test_a_pool_of_one_is_an_expert_that_all_tasks_share_without_a_gate(tmp_path, tiny_bert):
    tasks, options = small(tmp_path, "mood", "about"), {"experts__pool": 1, "train__epochs": 1}
    first = run(tasks, tiny_bert, tmp_path / "out", **options)
    further = train_joint([], None, tmp_path / "further", start=first.path, **options)
    for result in (first, further):
        model = load_checkpoint(result.path).model
        assert model.gate is None
        assert model.experts.names == ["pool-0"]
        assert {(slot.experts, slot.gated) for slot in model.tasks.values()} == {(("pool-0",), False)}
        assert not any("usage" in epoch for epoch in result.history)
    assert not equal(tensors(first.path), tensors(further.path))


@pytest.mark.parametrize(("experts", "changes", "expected"), [
    (17, {}, 4),
    (17, {"top_k": 6}, 6),
    (17, {"shortlist": 5}, 5),
    (17, {"capacity": 2.0}, None),
    (16, {}, None),
    (3, {"shortlist": 2}, 2),
])  # fmt: skip
def test_many_experts_get_a_shortlist_unless_it_is_said_otherwise(mixed, experts, changes, expected):
    names = [f"e{number}" for number in range(experts)]
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
    options = {"gate__type": "token", "train__epochs": 1, **POOL}
    path = train_joint(small(tmp_path, "mood", "about"), tiny_gpt2, tmp_path / "out", **options).path
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
