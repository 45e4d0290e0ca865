"""The same text gets the same answer, whatever else is in the batch, in whatever order, with however many threads."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from toy_checkpoints import assert_same
from toys import JOINT, ODD_TEXTS, SINGLE, varied_texts

import sparse_ft


@pytest.fixture(scope="module", params=["toys", "minilm_toys", *JOINT])
def model(request):
    """Experts and gate on a tiny backbone and on the real MiniLM, and tasks that a gate mixes, by token and by text."""
    path = request.getfixturevalue("joint_toys")(request.param) if request.param in JOINT else None
    return sparse_ft.load(path or request.getfixturevalue(request.param), device="cpu")


@pytest.fixture(scope="module")
def tasks(model):
    return [name for name in SINGLE if name in model.tasks]


@pytest.fixture(scope="module")
def texts(model):
    if model.checkpoint.model.backbone.name == "minilm":  # which is a hundred times as large
        return [*ODD_TEXTS[:6], "the table loved", "the table boring", "Ada met Mozart " * 30]
    return [*varied_texts(12), "the table loved", "the table boring"]


@pytest.fixture(scope="module")
def alone(model, tasks, texts):
    answers = [model.predict([text], tasks)[0] for text in texts]
    assert {answer.tasks["mood"]["label"] for answer in answers} == {"good", "bad"}
    assert any(answer.tasks["names"]["entities"] for answer in answers)
    return answers


def of(answer, tasks, routing):
    """The answer as it is when only some tasks are requested."""
    return replace(answer, tasks={name: answer.tasks[name] for name in tasks}, routing=routing)


def test_in_any_batch_and_order(model, tasks, texts, alone):
    assert_same(model.predict(texts, tasks), alone)
    order = random.Random(1).sample(range(len(texts)), len(texts))
    assert_same(model.predict([texts[index] for index in order], tasks), [alone[index] for index in order])


def test_in_batches_of_any_size(model, texts, monkeypatch):
    expected = {task: model.logits(texts, task) for task in ("mood", "names")}
    monkeypatch.setattr("sparse_ft.backbone.batching.MAX_TOKENS", 60)
    for task, logits in expected.items():
        for one, other in zip(model.logits(texts, task), logits, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_with_several_torch_threads(model, tasks, texts, alone):
    torch.set_num_threads(3)
    try:
        assert_same(model.predict(texts, tasks), alone)
    finally:
        torch.set_num_threads(1)


def test_from_several_threads_at_once(model, tasks, texts, alone, monkeypatch):
    """A task that cuts long texts beside one that reads them in windows: a tokenizer keeps such settings in itself."""
    configure = model.encoder.tokenizer.set_truncation_and_padding

    def configure_and_give_way(*args, **kwargs):
        configure(*args, **kwargs)
        time.sleep(0.005)

    monkeypatch.setattr(model.encoder.tokenizer, "set_truncation_and_padding", configure_and_give_way)
    jobs = [["mood"], ["names"], tasks]
    with ThreadPoolExecutor(3) as pool:
        for job, answers in zip(jobs, pool.map(lambda job: model.predict(texts, job), jobs), strict=True):
            for one, other in zip(answers, alone, strict=True):
                assert list(one.tasks) == job
                assert_same([one], [of(other, job, one.routing)])


def test_asking_for_one_task_answers_as_asking_for_all(model, tasks, texts, alone):
    for name in tasks:
        for one, other in zip(model.predict(texts, name), alone, strict=True):
            assert_same([one], [of(other, [name], one.routing)])
