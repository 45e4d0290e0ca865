"""A checkpoint through ``transformers.pipeline``."""

import shutil
import subprocess
import sys

import pytest
import torch
from transformers import pipeline

import sparse_ft
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.integrations.transformers_pipeline import SparseFTPipeline

TEXTS = ["the table loved", "Ada met Mozart in Lisbon", "half boring of", "", "music then football"]


@pytest.fixture(scope="module")
def model(toys):
    return sparse_ft.load(toys, device="cpu")


@pytest.fixture(scope="module")
def pipe(toys):
    return pipeline("sparse-ft", model=str(toys), device="cpu")


def lines(model, texts, tasks=None) -> list[dict]:
    return [answer.to_dict() for answer in model.predict(texts, tasks)]


def test_one_import_and_a_path_are_enough_in_a_new_process(toys):
    script = """
import sys
from transformers import pipeline
import sparse_ft.pipeline
print(pipeline("sparse-ft", model=sys.argv[1], device="cpu", tasks="mood")("the table loved")["tasks"]["mood"]["label"])
"""
    done = subprocess.run([sys.executable, "-c", script, str(toys)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "good"


def test_a_text_gives_an_answer_and_a_list_a_list(pipe, model):
    assert pipe(TEXTS[0]) == lines(model, TEXTS[:1])[0]
    assert pipe(TEXTS) == lines(model, TEXTS)
    assert pipe([]) == []


def test_tasks_are_those_of_the_call_or_else_of_the_pipeline(pipe, model):
    tasks = ["names", "about"]
    assert pipe(TEXTS, tasks=tasks) == lines(model, TEXTS, tasks)
    own = pipeline("sparse-ft", model=model, device=-1, tasks=tasks)
    assert own.device == torch.device("cpu")
    assert own(TEXTS) == lines(model, TEXTS, tasks)
    assert list(own(TEXTS[0], tasks="mood")["tasks"]) == ["mood"]


def test_a_pair_is_one_input(pipe, model):
    pair = ("the table", "half loved")
    assert pipe(pair, tasks="reply") == lines(model, [pair], "reply")[0]
    assert pipe([pair, pair[::-1]], tasks="reply") == lines(model, [pair, pair[::-1]], "reply")


@pytest.mark.parametrize("size", [1, 16])
def test_a_generator_is_read_a_batch_at_a_time(pipe, model, size):
    read = 0

    def source():
        nonlocal read
        for text in TEXTS * 4:
            read += 1
            yield text

    answers = pipe(source(), tasks="mood", batch_size=size)
    assert read == 0
    first = next(answers)
    assert read == size
    rest = [first, *answers]
    assert [line["text"] for line in rest] == TEXTS * 4
    for one, other in zip(rest, lines(model, TEXTS * 4, "mood"), strict=True):  # scores differ in the last bits
        assert one["tasks"]["mood"]["label"] == other["tasks"]["mood"]["label"]
        assert one["tasks"]["mood"]["score"] == pytest.approx(other["tasks"]["mood"]["score"], abs=1e-5)


def test_a_loaded_model_stays_where_it_is(toys, monkeypatch):
    model = sparse_ft.load(toys, device="cpu")
    monkeypatch.setattr(model, "to", lambda device: pytest.fail(f"moved to {device}"))
    assert SparseFTPipeline(model).device == torch.device("cpu")


def test_the_backbone_may_have_moved(toys, tmp_path, tiny_bert):
    shutil.copytree(tiny_bert, tmp_path / "moved")
    pipe = pipeline("sparse-ft", model=str(toys), model_kwargs={"backbone": str(tmp_path / "moved")}, device="cpu")
    assert pipe.model.checkpoint.model.backbone.name == str(tmp_path / "moved")


def test_mistakes_are_explained_by_us(pipe, toys, tmp_path):
    with pytest.raises(ConfigError, match=r"'moood'\. Did you mean 'mood'\?"):
        pipe("a", tasks="moood")
    with pytest.raises(ConfigError, match="'tpu'"):
        pipeline("sparse-ft", model=str(toys), device="tpu")
    (tmp_path / "config.json").write_text('{"model_type": "sparse-ft"}')
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        pipeline("sparse-ft", model=str(tmp_path))
