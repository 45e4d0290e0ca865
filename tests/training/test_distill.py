"""Experts of their own become one shared expert below small ones: answers, costs, refusals."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy_checkpoints import all_logits, assert_same, counted_blocks, equal, tensors
from toys import SINGLE, call, settings, write_toy

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.checkpoint.manifest import read_config, read_manifest
from sparse_ft.errors import ConfigError, SparseFTError
from sparse_ft.training.gradients import Gradients
from sparse_ft.training.shared_experts import start_from_teachers
from sparse_ft.training.teachers import Teacher, with_teacher_logits
from sparse_ft.training.training_task import prepare_task

TEXTS = ["the weather loved Ada Lovelace", "boring football in London and music", "Mozart", ""]


def distilled_into(output, toys, *, passes=1.7, tasks=SINGLE, resume=False, backbone=None, **changes):
    options = {"train__epochs": 3, "train__batch_size": 12, "shared__rank": 8, **changes}
    return sparse_ft.distill(
        toys, output=output, passes=passes, tasks=tasks, backbone=backbone, overrides=settings(**options),
        resume=resume, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def distilled(toys, tmp_path_factory):
    return distilled_into(tmp_path_factory.mktemp("distilled") / "one", toys)


def test_the_student_is_near_its_teachers_and_says_what_it_costs(distilled, toys):
    assert list(distilled.tasks) == SINGLE
    assert distilled.passes == pytest.approx(5 / 3)
    for name, entry in distilled.tasks.items():
        recorded = json.loads((toys / "metrics.json").read_text())[name]["metrics"][entry.metric]
        assert entry.teacher == pytest.approx(recorded, abs=1e-6)
        assert entry.student == distilled.training.scores[name][entry.metric]
        assert entry.drop < 0.2, name
    text = distilled.to_text()
    assert "1.67 passes" in text
    assert "mean" in text
    assert text.count(" points. ") == sum(entry.drop > 0.005 for entry in distilled.tasks.values())


def test_the_blocks_that_run_are_those_of_the_plan(distilled):
    model = sparse_ft.load(distilled.path, device="cpu")
    own = read_config(distilled.path / "config.yaml").shared.own_blocks
    assert set(own) == set(SINGLE)
    assert model.explain().startswith("3 tasks, one text: 1.67 passes")
    answers, rows = counted_blocks(model.checkpoint.model, lambda: model.predict(TEXTS[:1], "all"))
    assert set(answers[0].tasks) == set(SINGLE)
    assert rows == [sum(depth > 2 - block for depth in own.values()) + any(d <= 2 - block for d in own.values())
                    for block in range(3)]  # fmt: skip


def test_the_gate_reads_states_that_the_answer_needs(distilled):
    """A text without a task costs one pass: the gate reads the shared expert, and the answer goes on from there."""
    model = sparse_ft.load(distilled.path, device="cpu")
    inner = model.checkpoint.model
    assert read_manifest(distilled.path).gate.trunk_expert == inner.trunk_expert == "shared"
    assert inner.gate.block == inner.parting_block
    (answer,), rows = counted_blocks(inner, lambda: model.predict(TEXTS[:1]))
    parting = inner.parting_block
    assert rows[:parting] == [1] * parting
    assert all(count <= len(answer.tasks) for count in rows[parting:])
    named = model.predict(TEXTS[:1], list(answer.tasks))
    assert_same([replace(answer, routing={})], [replace(named[0], routing={}, left_out=answer.left_out)])


def test_texts_that_differ_in_capitals_only_do_not_mix_behind_the_gate(distilled):
    model = sparse_ft.load(distilled.path, device="cpu")
    texts = ["ada met mozart in london", "Ada met Mozart in London", "ADA met mozart in LONDON"]
    assert len({tuple(example.input_ids) for example in model.encoder.texts(texts)}) == 1
    assert_same(model.predict(texts), [model.predict([text])[0] for text in texts])


def test_the_tokens_of_a_text_are_shown_where_it_stands(distilled, monkeypatch, capsys):
    code, out, err = call(
        monkeypatch, capsys, "inspect", distilled.path, "--text", "Ada didn't love football.", "--json"
    )
    assert code == 0, err
    text = json.loads(out)["text"]
    for token in json.loads(out)["tokens"]:
        assert token["text"] in (text[token["start"] : token["end"]], "[CLS]", "[SEP]")


def test_tasks_alone_and_together_have_the_same_logits(distilled):
    logits = all_logits(load_checkpoint(distilled.path).model, SINGLE)
    for name in SINGLE:
        torch.testing.assert_close(logits[f"{name} alone"], logits[f"{name} together"], rtol=0, atol=1e-5)


def test_removing_a_task_leaves_the_others_bit_identical(distilled, tmp_path):
    before = sparse_ft.load(distilled.path, device="cpu")
    sparse_ft.edit(distilled.path, remove=["about"], output=tmp_path / "fewer")
    after = sparse_ft.load(tmp_path / "fewer", device="cpu")
    assert set(after.tasks) == {"mood", "names"}
    assert torch.equal(before.logits(TEXTS, "mood"), after.logits(TEXTS, "mood"))
    for one, other in zip(before.logits(TEXTS, "names"), after.logits(TEXTS, "names"), strict=True):
        assert torch.equal(one, other)


def test_a_later_task_reads_the_fixed_shared_expert(distilled, tmp_path):
    task = write_toy(tmp_path, "mood", as_name="later", sizes=(96, 16, 16))
    result = sparse_ft.train(
        [task], from_checkpoint=distilled.path, output=tmp_path / "more", device="cpu",
        overrides=settings(train__epochs=3),
    )  # fmt: skip
    before, after = tensors(distilled.path), tensors(tmp_path / "more")
    for name, tensor in before.items():
        assert name.startswith("gate") or torch.equal(tensor, after[name]), name
    model = sparse_ft.load(tmp_path / "more", device="cpu")
    slot = model.checkpoint.model.tasks["later"]
    assert (slot.experts, slot.shared) == (("later",), "shared")
    assert model.checkpoint.model.parting_block == 2
    assert result.scores["later"]["accuracy"] > 0.8
    assert torch.equal(
        sparse_ft.load(distilled.path, device="cpu").logits(TEXTS, "mood"), model.logits(TEXTS, "mood")
    )  # fmt: skip


def delta_of(model, name, module):
    expert = model.experts.get(name)
    if module not in expert.deltas:
        return 0.0
    lora_a, lora_b = expert.deltas[module]
    return lora_b @ lora_a * (expert.alpha / len(lora_a))


def test_a_student_begins_as_the_mean_of_its_teachers_and_above_as_its_own(make_model):
    heads = {"mood": ("text", 2), "names": ("word", 5)}
    checkpoint = SimpleNamespace(model=make_model("bert", heads))
    teachers = {name: Teacher(checkpoint, None, SimpleNamespace(name=name)) for name in heads}
    student = make_model("bert", {})
    modules = student.backbone.select_linears(first_block=0)
    student.experts.create("shared", modules=modules, rank=10, alpha=3.0, seed=1)
    for name, (level, outputs) in heads.items():
        upper = student.backbone.select_linears(first_block=2)
        student.experts.create(name, modules=upper, rank=16, alpha=5.0, seed=1)
        student.add_task(name, expert=name, level=level, num_outputs=outputs, shared="shared")
    start_from_teachers(student, teachers)
    for module in modules:
        own = [delta_of(checkpoint.model, name, module) for name in heads]
        torch.testing.assert_close(delta_of(student, "shared", module), sum(own) / 2, rtol=0, atol=1e-4)
        for name, delta in zip(heads, own, strict=True):
            if student.backbone.block_of(module) == 2:
                together = delta_of(student, "shared", module) + delta_of(student, name, module)
                torch.testing.assert_close(together, delta, rtol=0, atol=1e-4)
    for name in heads:
        assert torch.equal(student.head(name).linear.weight, checkpoint.model.head(name).linear.weight)


def test_a_teacher_on_another_backbone_gives_its_answers_only(make_model):
    checkpoint = SimpleNamespace(model=make_model("distilbert", {"mood": ("text", 2)}))
    student = make_model("bert", {"mood": ("text", 2)})
    student.experts.create("shared", modules=[], rank=4, alpha=3.0, seed=1)
    before = tensors_of(student)
    start_from_teachers(student, {"mood": Teacher(checkpoint, None, SimpleNamespace(name="mood"))})
    assert equal(before, tensors_of(student))


def tensors_of(model):
    expert = model.experts.get("mood")
    pairs = {f"{module}.{index}": part for module, pair in expert.deltas.items() for index, part in enumerate(pair)}
    return pairs | {name: value.clone() for name, value in model.head("mood").state_dict().items()}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_echoes_add_the_gradients_of_their_texts(distilled, toys, accumulation):
    """Texts of other tasks that share blocks in training give the gradients that they give apart."""
    run = read_config(distilled.path / "config.yaml")
    values = {**run.model_dump(), "train": {**run.train.model_dump(), "accumulation": accumulation, "workers": 1}}
    run = run.model_validate(values)
    student, checkpoint = load_checkpoint(distilled.path), load_checkpoint(toys)
    model, encoder = student.model, student.encoder
    tasks = {name: prepare_task(spec, run=run, encoder=encoder, before=spec) for name, spec in student.tasks.items()}
    teachers = {name: Teacher(checkpoint, checkpoint.encoder, spec) for name, spec in student.tasks.items()}
    tasks = with_teacher_logits(tasks, teachers, transfer="words", encoder=encoder)
    parameters = [p for name in model.experts.names for p in model.experts.parameters(name).values() if p.numel()]
    batch = [("about", 0), ("about", 1), ("mood", 2), ("mood", 3), ("names", 4), ("names", 5)]

    without = {name: replace(task, transfer={}) for name, task in tasks.items()}

    def gradients(tasks, *, planned, accumulation):
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        forward = model.forward
        model.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "planned": planned and kwargs["planned"]})
        model.train()
        train = {**run.train.model_dump(), "accumulation": accumulation, "workers": 1}
        parts = run.model_validate({**run.model_dump(), "train": train})
        Gradients(model, tasks, parameters=parameters, run=parts).add(batch, step=0, teacher_weight=0.5)
        del model.forward
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])

    assert tasks["mood"].transfer["names"][2]
    reference = gradients(tasks, planned=False, accumulation=1)
    torch.testing.assert_close(gradients(tasks, planned=True, accumulation=3), reference, rtol=1e-4, atol=1e-6)
    assert (gradients(without, planned=True, accumulation=3) - reference).norm() > 0.1 * reference.norm()


def test_labels_alone_train_it_without_teachers(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(96, 16, 16)) for name in ("mood", "names")]
    result = sparse_ft.train(
        tasks, backbone=str(tiny_bert), output=tmp_path / "shared", stage="shared", device="cpu",
        overrides=settings(train__epochs=2, shared__passes=1.4, shared__rank=8),
    )  # fmt: skip
    assert read_config(result.path / "config.yaml").shared.own_blocks == {"mood": 1, "names": 1}
    assert result.scores["mood"]["accuracy"] > 0.7
    assert "1.33 passes" in sparse_ft.load(result.path, device="cpu").explain()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"passes": 0.5}, "passes"),
        ({"tasks": ["moood"]}, "Did you mean 'mood'"),
        ({"shared__own_blocks": {"names": 4}}, "gives task 'names' 4 blocks; the backbone has 3"),
        ({"shared__own_blocks": {"names": 3, "mood": 3}}, "to 3, or give fewer"),
        ({"shared__own_blocks": {"nams": 1}}, "Did you mean 'names'"),
        ({"experts__pool": 2}, "does not take experts.pool"),
        ({"experts__first_block": 1}, "does not take experts.first_block"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(toys, tmp_path, options, said):
    with pytest.raises(SparseFTError, match=said):
        distilled_into(tmp_path / "none", toys, **options)
    assert not (tmp_path / "none").exists()


def test_settings_of_the_shared_form_need_its_stage(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(4, 2, 2))
    with pytest.raises(ConfigError, match=r"shared\.rank applies to --stage shared"):
        sparse_ft.train([task], backbone=str(tiny_bert), overrides=["shared.rank=4"], output=tmp_path / "none")


def test_the_command_prints_the_table(toys, tmp_path, monkeypatch, capsys):
    moods = tmp_path / "moods"
    sparse_ft.edit(toys, remove=["reply", "about", "names"], rename_task=[("mood", "mood2")], output=moods)
    options = [part for each in settings(train__epochs=1, shared__rank=4) for part in ("--set", each)]
    code, out, err = call(
        monkeypatch, capsys, "distill", toys, moods, "--passes", "1", "--task", "mood2", "--task", "names",
        "--output", tmp_path / "heads", "--device", "cpu", *options,
    )  # fmt: skip
    assert code == 0, err
    assert "1.00 passes" in out
    assert f"Next: sparse-ft evaluate {tmp_path / 'heads'}" in out
    heads = sparse_ft.load(tmp_path / "heads", device="cpu")
    assert heads.explain().startswith("2 tasks, one text: 1.00 passes")
    inner = heads.checkpoint.model
    assert inner.parting_block == 2
    assert counted_blocks(inner, lambda: heads.predict(TEXTS[:1]))[1] == [1, 1, 1]
    assert "passes:     1.00" in call(monkeypatch, capsys, "inspect", tmp_path / "heads")[1]
    code, _, err = call(monkeypatch, capsys, "distill", tmp_path / "nothing", "--output", tmp_path / "other")
    assert code == 2
    assert "nothing" in err


def test_a_gate_is_fitted_anew_and_joint_training_is_refused(distilled, tmp_path):
    result = sparse_ft.train(stage="gate", from_checkpoint=distilled.path, output=tmp_path / "gate", device="cpu")
    assert read_manifest(result.path).gate.trunk_expert == "shared"
    with pytest.raises(ConfigError, match="share the expert 'shared' below their own"):
        sparse_ft.train(stage="joint", from_checkpoint=distilled.path, output=tmp_path / "joint", device="cpu")


def test_an_interrupted_distillation_ends_as_the_whole_one(distilled, toys, tmp_path, monkeypatch):
    steps = []
    from sparse_ft.training.loop import _Loop

    step = _Loop.step

    def stop(loop, batch):
        steps.append(1)
        if len(steps) == 13:
            raise KeyboardInterrupt
        step(loop, batch)

    monkeypatch.setattr(_Loop, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        distilled_into(tmp_path / "part", toys, train__save_steps=5)
    monkeypatch.undo()
    distilled_into(tmp_path / "part", toys, train__save_steps=5, resume=True)
    assert equal(tensors(tmp_path / "part"), tensors(distilled.path))
