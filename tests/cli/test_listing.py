"""What `tasks` and `inspect` show."""

import json
import re
import shutil

import pytest
from toys import KINDS, write_toy

from sparse_ft.checkpoint.manifest import read_metrics
from sparse_ft.cli.listing import describe_checkpoint, describe_task, describe_tasks
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.tasks.spec import list_tasks, load_task


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def test_every_bundled_task_has_a_line():
    lines = describe_tasks().splitlines()
    table = {cells(line)[0]: cells(line) for line in lines[1:] if len(cells(line)) == 5}
    assert cells(lines[0]) == ["task", "kind", "language", "labels", "data"]
    assert set(table) == set(list_tasks())
    for name, row in table.items():
        spec = load_task(name)
        assert row[1:3] == [spec.kind, spec.language]
        assert row[3] == (str(len(spec.label_names)) if spec.label_names else "-")
    assert [table[name][4] for name in ("sentiment", "topic", "intent", "ner")] == ["bundled sample"] * 4
    assert set(list(table)[:4]) == {"sentiment", "topic", "intent", "ner"}  # those that need no download come first
    assert "--data" in table["conll2003"][4]


@pytest.mark.parametrize("name", list_tasks())
def test_a_task_is_shown_with_source_labels_and_example(name):
    spec, text = load_task(name), describe_task(name)
    found = "those found in train" if spec.has_labels else "each row's own"
    assert text.startswith(f"{name.rpartition('/')[2]}: {spec.description}")
    for said in (spec.kind, spec.example, spec.license, spec.source, *(spec.label_names or [found])):
        assert said in text
    if spec.hub is not None:
        assert spec.hub.path in text
    if spec.files is not None:
        assert str(spec.files.train) in text
    assert text.splitlines()[1].startswith("kind:     ")


def test_a_task_file_of_the_user_is_shown(tmp_path):
    text = describe_task(write_toy(tmp_path, "mood", sizes=(2, 2, 2), labels=["bad", "good"]))
    assert "mood" in text.splitlines()[0]
    assert "bad, good" in text


def test_unknown_task():
    with pytest.raises(ConfigError, match=r"Unknown task 'topics'\. Did you mean 'topic'\?"):
        describe_task("topics")


def test_a_checkpoint_is_shown_with_its_experts_and_scores(toys, tiny_bert):
    text = describe_checkpoint(toys)
    manifest, metrics = (json.loads((toys / f"{name}.json").read_text()) for name in ("manifest", "metrics"))
    assert str(tiny_bert.resolve()) in text
    assert manifest["backbone"]["weights_sha256"][:12] in text
    experts, tasks = text.split("\ntask ")
    for name in KINDS:
        (row,) = [cells(line) for line in experts.splitlines() if line.startswith(f"{name} ")]
        size = sum((toys / "experts" / name / file).stat().st_size
                   for file in ("adapter_config.json", "adapter_model.safetensors"))  # fmt: skip
        assert row == [name, "8", "16", "18", f"{size / 1e6:.2f}", name]
        (row,) = [line for line in tasks.splitlines() if line.startswith(f"{name} ")]
        assert cells(row)[1:4] == [name, KINDS[name], "2"]
        metric, value = next(iter(metrics[name]["metrics"].items()))
        assert f"{metric} {value:.3f}" in row
        assert "on test (32 rows)" in row


def test_a_checkpoint_without_scores_is_shown(toys, tmp_path):
    copied = shutil.copytree(toys, tmp_path / "copied")
    (copied / "metrics.json").unlink()
    assert "on test" not in describe_checkpoint(copied)
    (copied / "heads/mood.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"heads/mood\.safetensors is missing"):
        describe_checkpoint(copied)


def test_a_checkpoint_says_what_its_gate_is_and_how_often_it_is_right(toys):
    line = next(line for line in describe_checkpoint(toys).splitlines() if line.startswith("gate:"))
    assert line.startswith(
        "gate:       sequence, top 1, reads what enters blocks 0 to 1; right on validation rows: mood "
    )
    for name in KINDS:
        share = read_metrics(toys)[name]["routing_accuracy"]
        assert f"{name} {share:.3f}" in line
        assert 0 <= share <= 1
