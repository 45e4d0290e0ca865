"""Adding or removing an expert leaves the logits of every other task bit-identical.

Each family, with experts that are created in memory: test_families.py. Each change of `edit`: merging/test_edit.py.
"""

import pytest
from toy_checkpoints import answers, assert_bit_identical
from toys import SINGLE, settings, write_toy

import sparse_ft
from sparse_ft.merging.edit import edit


@pytest.mark.parametrize("kind", ["own experts", "token"])
def test_a_task_that_is_trained_later_and_removed_again_changes_no_other(tmp_path, toys, joint_toys, kind):
    old = joint_toys(kind) if kind == "token" else toys
    before = answers(old, *SINGLE)
    task = write_toy(tmp_path, "mood", as_name="later", sizes=(16, 4, 4))
    options = settings(train__epochs=1, experts__rank=3, experts__first_block=1)
    new = sparse_ft.train(
        [task], from_checkpoint=old, output=tmp_path / "new", overrides=options, device="cpu", stage="experts"
    )
    after = answers(new.path, *SINGLE, "later")
    assert_bit_identical(before, {name: after[name] for name in before})
    edit(new.path, remove=["later"], output=tmp_path / "removed")
    assert_bit_identical(before, answers(tmp_path / "removed", *SINGLE))


def test_a_task_that_is_removed_changes_no_other(tmp_path, toys):
    before = answers(toys, "about", "names")
    edit(toys, remove=["mood"], output=tmp_path / "out")
    assert_bit_identical(before, answers(tmp_path / "out", "about", "names"))
