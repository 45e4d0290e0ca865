"""What a checkpoint holds, that it comes back bit by bit, and what a damaged one says."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from toy_checkpoints import save_model
from toys import KINDS, run, settings, write_toy

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone, set_attention
from sparse_ft.checkpoint import checkpoint as checkpoint_module
from sparse_ft.checkpoint import folders
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.manifest import FORMAT, check_name, read_manifest
from sparse_ft.cli.listing import describe_checkpoint
from sparse_ft.errors import BackboneError, CheckpointError, ConfigError
from sparse_ft.experts.routing import Routing
from sparse_ft.merging.add import find_experts

TEXTS = ["the table loved", "", "Ada Lovelace met Mozart in London", "at six " * 60]


@pytest.fixture
def copied(toys, tmp_path):
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(toys, tmp_path / "checkpoint"))


def all_files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def change_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What is in it


def test_the_set_of_files(toys):
    experts = [f"experts/{name}/adapter_{part}" for name in KINDS for part in ("config.json", "model.safetensors")]
    files = ["manifest.json", "config.json", "config.yaml", "metrics.json", "gate.safetensors", *experts]
    files += [f"heads/{name}.safetensors" for name in KINDS] + [f"tasks/{name}.yaml" for name in KINDS]
    files += ["experts/names/word_shapes.safetensors"]  # of the one that tags words on an uncased backbone
    contents = all_files(toys)
    assert sorted(name for name in contents if not name.startswith("tokenizer/")) == sorted(files)
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} <= set(contents)
    assert [entry.name for entry in toys.parent.iterdir() if entry.name.startswith(".")] == []


def test_nothing_is_pickled_and_the_backbone_is_not_in_it(toys, tiny_bert):
    for name, content in all_files(toys).items():
        assert Path(name).suffix in {".json", ".yaml", ".safetensors", ".txt", ".jinja"}, name
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), name
        if name.endswith(".safetensors"):
            assert b"embeddings" not in content
    size = sum(len(content) for name, content in all_files(toys).items() if name.startswith("experts/mood/"))
    assert size < (tiny_bert / "model.safetensors").stat().st_size


def test_the_manifest_is_written_last_and_lists_the_rest(toys, tmp_path, monkeypatch):
    loaded = load_checkpoint(toys)
    present, write = [], checkpoint_module.write_json

    def watching(path, content):
        if path.name == "manifest.json":
            present.append(set(all_files(path.parent)))
        write(path, content)

    monkeypatch.setattr(checkpoint_module, "write_json", watching)
    target = tmp_path / "out"
    save_checkpoint(target, model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics=loaded.metrics)
    assert present == [set(all_files(target)) - {"manifest.json"}]
    listed = json.loads((target / "manifest.json").read_text())["bytes"]
    assert set(listed) == present[0] - {"metrics.json"}
    assert listed == {name: len(content) for name, content in all_files(target).items() if name in listed}


def test_a_checkpoint_under_the_home_folder_is_found(toys, monkeypatch):
    monkeypatch.setenv("HOME", str(toys.parent))
    assert load_checkpoint(f"~/{toys.name}").path == toys


def test_the_manifest_refers_to_the_backbone(toys, tiny_bert):
    manifest = read_manifest(toys)
    backbone = load_backbone(str(tiny_bert))
    assert manifest["backbone"] == {
        "name": str(tiny_bert.resolve()), "revision": None, "weights_sha256": backbone.weights_sha256
    }  # fmt: skip
    assert manifest["format"] == FORMAT
    assert manifest["versions"]["sparse_ft"] == sparse_ft.__version__
    assert manifest["tasks"] == {name: {"expert": name, "kind": kind} for name, kind in KINDS.items()}


# It comes back


@pytest.mark.parametrize(("family", "options"), [
    ("bert", {}),
    ("bert", {"targets": ["query", "dense"], "rank": 3, "alpha": 5.0}),
    ("gpt2", {"first_block": 2, "targets": ["c_attn"]}),
    ("deberta-v2", {"first_block": 1}),
])  # fmt: skip
def test_an_expert_is_a_peft_adapter(tmp_path, tiny_folder, make_model, family, options):
    from peft import PeftModel
    from transformers import AutoModel

    path = save_model(tmp_path, make_model(family, {"mood": ("text", 2)}, **options))
    ours = load_checkpoint(path).model
    set_attention(ours.backbone, "eager")
    plain = AutoModel.from_pretrained(tiny_folder(family), attn_implementation="eager").eval()
    inputs = {"input_ids": torch.tensor([[2, 11, 12, 13, 14, 3], [2, 20, 21, 22, 23, 3]])}
    with torch.no_grad():
        bare = plain(**inputs).last_hidden_state
        theirs = PeftModel.from_pretrained(plain, path / "experts/mood").eval()(**inputs).last_hidden_state
        with ours.slot.filled(Routing.one_hot([0, 0])):
            states = ours.encoder(**inputs).last_hidden_state
    assert torch.equal(states, theirs)
    assert not torch.equal(states, bare)


def test_the_backbone_may_have_moved(copied, tiny_bert, tmp_path):
    moved = shutil.copytree(tiny_bert, tmp_path / "moved")
    manifest = read_manifest(copied)
    change_manifest(copied, backbone={**manifest["backbone"], "name": str(tmp_path / "gone")})
    with pytest.raises(BackboneError, match="gone"):
        sparse_ft.load(copied, device="cpu")
    there = sparse_ft.load(copied, device="cpu", backbone=str(moved))
    assert there.predict(["the table loved"], ["mood"])[0].tasks["mood"]["label"] in {"good", "bad"}


# A damaged one says so


def damaged(folder: Path, error=CheckpointError) -> str:
    with pytest.raises(error) as caught:
        load_checkpoint(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["experts/mood/adapter_model.safetensors", "experts/names/adapter_config.json",
                                  "heads/about.safetensors", "tasks/reply.yaml", "config.yaml",
                                  "tokenizer/tokenizer.json"])  # fmt: skip
def test_a_missing_or_cut_file_is_named(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).unlink()
    assert f"is incomplete: {name} is missing. Copy the folder again" in damaged(copied)
    (copied / name).write_bytes(content[:-1])
    assert f"{name} has {len(content) - 1} bytes instead of {len(content)}" in damaged(copied)


def manifest(content):
    """Write a whole manifest, or change entries of the one that is there."""
    if isinstance(content, str):
        return lambda folder: (folder / "manifest.json").write_text(content)
    return lambda folder: change_manifest(folder, **content)


def not_finite(name, value):
    def spoil(folder):
        from safetensors import safe_open

        with safe_open(folder / name, "pt") as opened:
            metadata = opened.metadata()
        tensors = safetensors.torch.load_file(folder / name)
        tensors[min(tensors)].view(-1)[0] = value
        (folder / name).write_bytes(safetensors.torch.save(tensors, metadata=metadata))

    return spoil


def other_head(folder):
    sizes = read_manifest(folder)["bytes"]
    (folder / "heads/mood.safetensors").write_bytes((folder / "heads/names.safetensors").read_bytes())
    change_manifest(folder, bytes={**sizes, "heads/mood.safetensors": sizes["heads/names.safetensors"]})


def no_json(folder):
    file = folder / "experts/mood/adapter_config.json"
    file.write_bytes(b"{" * file.stat().st_size)


NEWER = {"format": FORMAT + 1, "versions": {"sparse_ft": "9.8.7"}}
NOT_FINITE = "{0}' holds NaN or infinite numbers in '|. Train this expert again."

DAMAGES = [
    *[(manifest(content), "manifest.json' is damaged")
      for content in ("", "{", '{"format": 1,', "[]", "null", '{"format": "x"}', '{"format": 1}')],
    *[(manifest(changes), "manifest.json' is damaged")
      for changes in ({"bytes": []}, {"bytes": 5}, {"tasks": []}, {"tasks": {"mood": {}}},
                      {"tasks": {"mood": {"expert": "nobody"}}})],
    (manifest(NEWER), f"has format {FORMAT + 1}; this sparse-ft {sparse_ft.__version__} reads up to {FORMAT}"),
    (manifest(NEWER), "written by sparse-ft 9.8.7: update with `pip install -U sparse-ft`"),
    (not_finite("experts/mood/adapter_model.safetensors", float("nan")), NOT_FINITE.format("model.safetensors")),
    (not_finite("heads/mood.safetensors", float("inf")), NOT_FINITE.format("mood.safetensors")),
    (other_head, "mood.safetensors' does not fit the labels of its task"),
    (no_json, "adapter_config.json"),
    (lambda folder: (folder / "metrics.json").write_text("{"), "metrics.json' is damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), DAMAGES)
def test_a_damaged_checkpoint_is_refused(copied, spoil, said):
    spoil(copied)
    text = damaged(copied)
    assert all(part in text for part in said.split("|"))


def test_scores_may_be_missing(copied):
    (copied / "metrics.json").unlink()
    assert load_checkpoint(copied).metrics == {}


def test_another_backbone_is_refused(copied, tiny_folder):
    other = tiny_folder("bert", seed=1)
    with pytest.raises(BackboneError, match=r"sha256 [0-9a-f]{64}, which is not that of the checkpoint's backbone"):
        load_checkpoint(copied, backbone=str(other))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/b", "..", "", "-x", "a" * 65, "a.b", "a\nb"])
def test_a_name_is_no_path(name):
    with pytest.raises(CheckpointError, match="is not allowed: use letters, digits, - and _"):
        check_name(name)


@pytest.mark.parametrize(("read", "section"), [
    (load_checkpoint, "experts"), (load_checkpoint, "tasks"), (describe_checkpoint, "tasks"),
])  # fmt: skip
def test_a_name_from_a_manifest_never_becomes_a_path_unchecked(copied, section, read):
    manifest = json.loads((copied / "manifest.json").read_text())
    shutil.copytree(copied / "experts/mood", copied.parent / "evil")
    shutil.copy(copied / "tasks/mood.yaml", copied / "evil.yaml")
    change_manifest(copied, **{section: {**manifest[section], "../evil": manifest[section]["mood"]}})
    with pytest.raises(CheckpointError, match=r"The name '\.\./evil' is not allowed"):
        read(copied)


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"Checkpoint folder '.*nothing' does not exist"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json, so it is no checkpoint\. Give the folder"):
        load_checkpoint(tmp_path)


def test_an_unfinished_run_says_how_to_finish_it(tmp_path):
    folder = tmp_path / "unfinished"
    (folder / "resume").mkdir(parents=True)
    assert f"did not finish: `sparse-ft train --resume --output {folder}` continues it" in damaged(folder)


# Saves that fail


def save_again(path: Path, source: Path) -> None:
    loaded = load_checkpoint(source)
    save_checkpoint(path, model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics={"changed": True})


def test_readers_change_nothing_where_a_save_was_killed(copied):
    """The old folder has moved away and the new one has not come."""
    old = copied.rename(copied.with_name(f".{copied.name}.old"))
    before = sorted(copied.parent.rglob("*"))
    for read in (read_manifest, load_checkpoint, describe_checkpoint):
        with pytest.raises(CheckpointError, match=r"is being replaced, or its last save was killed\. Try again"):
            read(copied)
    assert find_experts(copied) is None
    assert sorted(copied.parent.rglob("*")) == before
    assert old.is_dir()


@pytest.mark.parametrize("number", [1, 3, 16])  # the last is that of the staged folder
def test_a_save_that_fails_leaves_the_old_checkpoint_whole(toys, copied, monkeypatch, number):
    before, calls = all_files(copied), []

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "fsync", failing)
        with pytest.raises(CheckpointError, match=r"cannot be written: no space left on the disk \(\d+ MiB free\)"):
            save_again(copied, toys)
    assert all_files(copied) == before
    assert [entry.name for entry in copied.parent.iterdir()] == ["checkpoint"]
    load_checkpoint(copied)


def test_a_save_without_space_for_a_new_checkpoint_leaves_nothing(toys, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_bytes", full)
    with pytest.raises(CheckpointError, match="no space left"):
        save_again(tmp_path / "deep/out", toys)
    assert not (tmp_path / "deep").exists()


def test_a_full_disk_at_the_very_end_leaves_a_checkpoint_that_loads(tmp_path, tiny_bert, monkeypatch):
    """The scores on test are added to metrics.json after the checkpoint is complete."""

    real = os.fsync

    def full(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink() == tmp_path / "out/.metrics.json.new":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="no space left"):
            run([task], tiny_bert, tmp_path / "out", train__epochs=1)
    assert load_checkpoint(tmp_path / "out").metrics["mood"]["validation"] >= 0


def test_an_existing_checkpoint_is_never_trained_over(copied, tiny_bert, tmp_path):
    before = all_files(copied)
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4))
    with pytest.raises(ConfigError, match=r"holds a checkpoint already\. Choose another --output"):
        sparse_ft.train([task], backbone=str(tiny_bert), output=copied, overrides=settings(), device="cpu")
    assert all_files(copied) == before
