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
        assert row[1:4] == [spec.kind, spec.language, str(len(spec.label_names)) if spec.label_names else "-"]
    assert set(list(table)[:4]) == {"sentiment", "topic", "intent", "ner"}  # those that need no download come first
    assert "--data" in table["conll2003"][4]


def test_a_task_is_shown_with_source_labels_and_example(tmp_path):
    for name in list_tasks():
        spec, text = load_task(name), describe_task(name)
        assert text.startswith(f"{name.rpartition('/')[2]}: {spec.description}")
        hub = spec.hub.path if spec.hub is not None else ""
        for said in (spec.kind, spec.example, spec.license, spec.source, hub, *(spec.label_names or [])):
            assert said in text, name
    own = describe_task(write_toy(tmp_path, "mood", sizes=(2, 2, 2), labels=["bad", "good"]))
    assert "bad, good" in own
    with pytest.raises(ConfigError, match=r"'topics'\. Did you mean 'topic'\?"):
        describe_task("topics")


def test_a_checkpoint_is_shown_with_its_experts_gate_and_scores(toys, tiny_bert):
    text = describe_checkpoint(toys)
    manifest, metrics = (json.loads((toys / f"{name}.json").read_text()) for name in ("manifest", "metrics"))
    assert str(tiny_bert.resolve()) in text
    assert manifest["backbone"]["weights_sha256"][:12] in text
    (gate,) = [line for line in text.splitlines() if line.startswith("gate:")]
    assert gate.startswith("gate:       sequence, top 1, reads what enters blocks 0 to 1")
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
        assert f"{name} {read_metrics(toys)[name]['routing_accuracy']:.3f}" in gate


def test_a_checkpoint_without_scores_is_shown_and_one_without_a_head_is_not(toys, tmp_path):
    copied = shutil.copytree(toys, tmp_path / "copied")
    (copied / "metrics.json").unlink()
    assert "on test" not in describe_checkpoint(copied)
    (copied / "heads/mood.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"heads/mood\.safetensors"):
        describe_checkpoint(copied)
