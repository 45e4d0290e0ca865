"""The plan of a call, as a user sees it."""

import pytest
from toy_checkpoints import saved, saved_joint
from toys import call

import sparse_ft


def test_tasks_share_the_blocks_below_their_experts(tmp_path, make_model):
    model = sparse_ft.load(saved(tmp_path, make_model, "bert"), device="cpu")
    assert model.explain().splitlines() == [
        "3 tasks, one text: 2.67 passes through the backbone's 3 blocks",
        "  block 0       mood | about, names",
        "  blocks 1-2    mood | about | names",
    ]


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_joint_tasks_are_one_pass(tmp_path, make_model, kind):
    model = sparse_ft.load(saved_joint(kind, tmp_path, make_model), device="cpu")
    assert model.explain(["mood", "about"]).startswith("2 tasks, one text: 1.00 passes")


def test_predict_explains_and_answers_nothing(tmp_path, make_model, monkeypatch, capsys):
    path = saved(tmp_path, make_model, "bert")
    code, out, _ = call(monkeypatch, capsys, "predict", path, "--explain", "--task", "mood")
    assert code == 0
    assert out == sparse_ft.load(path, device="cpu").explain(["mood"]) + "\n"
    code, out, err = call(monkeypatch, capsys, "predict", path, "--explain", "--task", "moood")
    assert (code, out) == (2, "")
    assert "Did you mean 'mood'?" in err
