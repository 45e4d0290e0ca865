"""Saving what was loaded gives the same bytes. Logits in a new process: test_new_processes.py."""

import pytest
from toys import JOINT

from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint


@pytest.mark.parametrize("kind", ["own experts", *JOINT])
def test_saving_what_was_loaded_gives_the_same_bytes(toys, joint_toys, tmp_path, kind):
    path = joint_toys(kind) if kind in JOINT else toys
    loaded = load_checkpoint(path)
    save_checkpoint(
        tmp_path / "out", model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics=loaded.metrics
    )
    contents = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (path, tmp_path / "out")
    ]
    assert contents[0] == contents[1]
