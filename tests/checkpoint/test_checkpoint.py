"""What a checkpoint holds, that it comes back bit by bit, and what a damaged one says."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from toy_checkpoints import save_model, sign
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


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def change_manifest(folder: Path, **changes) -> None:
    (folder / "manifest.json").write_text(json.dumps({**manifest_of(folder), **changes}))


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
    contents = {name: content for name, content in all_files(target).items() if name in present[0] - {"metrics.json"}}
    assert manifest_of(target)["bytes"] == {name: len(content) for name, content in contents.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert manifest_of(target)["sha256"] == hashes


def test_a_checkpoint_under_the_home_folder_is_found(toys, monkeypatch):
    monkeypatch.setenv("HOME", str(toys.parent))
    assert load_checkpoint(f"~/{toys.name}").path == toys


def test_the_manifest_refers_to_the_backbone(toys, tiny_bert):
    manifest = manifest_of(toys)
    backbone = load_backbone(str(tiny_bert))
    assert manifest["backbone"] == {
        "name": str(tiny_bert.resolve()), "revision": None, "weights_sha256": backbone.weights_sha256, "num_blocks": 3
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
    change_manifest(copied, backbone={**manifest_of(copied)["backbone"], "name": str(tmp_path / "gone")})
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


def tensors(name, change):
    """Change tensors of a file, which keeps its metadata."""

    def spoil(folder):
        with safe_open(folder / name, "pt") as opened:
            metadata = opened.metadata()
        changed = change(safetensors.torch.load_file(folder / name))
        (folder / name).write_bytes(safetensors.torch.save(changed, metadata=metadata))
        sign(folder)

    return spoil


def first(change):
    """Change the first tensor."""
    return lambda tensors: {**tensors, min(tensors): change(tensors[min(tensors)])}


def with_number(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return first(change)


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def adapter(**changes):
    """Change adapter_config.json of an expert; infinity becomes the number that JSON lacks."""

    def spoil(folder):
        file = folder / "experts/mood/adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        sign(folder)

    return spoil


def entries(section, name, **changes):
    """Change an entry of the manifest."""

    def spoil(folder):
        entries = manifest_of(folder)[section]
        change_manifest(folder, **{section: {**entries, name: {**entries[name], **changes}}})

    return spoil


def gate(**changes):
    return lambda folder: change_manifest(folder, gate={**manifest_of(folder)["gate"], **changes})


def other_head(folder):
    (folder / "heads/mood.safetensors").write_bytes((folder / "heads/names.safetensors").read_bytes())
    sign(folder)


def other_kind(folder):
    file = folder / "tasks/about.yaml"
    file.write_text(file.read_text().replace("kind: multi_label", "kind: classification"))
    sign(folder)


def swapped(folder):
    """Two experts of equal size take each other's files."""
    one, other = (folder / f"experts/{name}/adapter_model.safetensors" for name in ("mood", "about"))
    contents = one.read_bytes(), other.read_bytes()
    assert len(contents[0]) == len(contents[1])
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])


def linked(folder):
    file = folder / "heads/mood.safetensors"
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


def unlisted(folder):
    (folder / "tokenizer/added_tokens.json").write_text("{}")


def no_json(folder):
    (folder / "experts/mood/adapter_config.json").write_text("{" * 9000)
    sign(folder)


NEWER = {"format": FORMAT + 1, "versions": {"sparse_ft": "9.8.7"}}
NOT_FINITE = "{0}' holds NaN or infinite numbers in '|. Train this expert again."

MOOD = "experts/mood/adapter_model.safetensors"

DAMAGES = [
    *[(manifest(content), "manifest.json' is damaged")
      for content in ("", "{", '{"format": 1,', "[]", "null", '{"format": "x"}', '{"format": 1}', "[" * 9000)],
    *[(manifest(changes), "manifest.json' is damaged|" + said)
      for changes, said in (
          ({"bytes": []}, "bytes: Input should be a valid dictionary"),
          ({"bytes": {}, "sha256": {}}, "it does not list the file 'config.yaml'"),
          ({"sha256": {}}, "`bytes` and `sha256` list different files"),
          ({"tasks": {}}, "it lists the file 'heads/about.safetensors', but not what the file belongs to"),
          ({"gate": None}, "it lists the file 'gate.safetensors', but not what the file belongs to"),
          ({"tasks": []}, "tasks: Input should be a valid dictionary"),
          ({"tasks": {"mood": {}}}, "tasks.mood.kind: Field required"),
          ({"tasks": {"mood": {"kind": "classification"}}}, "needs either `expert` or `experts`"),
          ({"tasks": {"mood": {"expert": "nobody", "kind": "classification"}}}, "it lacks the expert 'nobody'"),
          ({"tasks": {"mood": {"expert": "mood", "kind": "classification", "shared": "x"}}}, "lacks the expert 'x'"),
          ({"pooling": "median"}, "pooling: Input should be 'unit', 'mean', 'first' or 'last' (got 'median')"),
          ({"first_block": "0"}, "first_block: Input should be a valid integer"),
          ({"first_block": 2}, "its first_block is 2, that of its experts is "),
          ({"backbone": ["minilm"]}, "backbone: Input should be a valid dictionary"),
          ({"backbone": {"name": 5, "revision": None, "weights_sha256": "0" * 64}}, "backbone.name: "),
          ({"backbone": {"name": "minilm", "revision": None, "weights_sha256": None}}, "backbone.weights_sha256: "),
          ({"oracle": True}, "Unknown key 'oracle'"),
      )],
    (manifest({"bytes": {"../../etc/passwd": 5}}), "expected the path of a file inside the checkpoint"),
    (manifest({"bytes": {"tokenizer/evil.py": 5}}), "a checkpoint holds only .jinja, .json"),
    (manifest(NEWER), f"has format {FORMAT + 1}; this sparse-ft {sparse_ft.__version__} reads up to {FORMAT}"),
    (manifest(NEWER), "written by sparse-ft 9.8.7: update with `pip install -U sparse-ft`"),
    (entries("experts", "mood", rank=5), "it has rank 8 on|, the manifest says rank 5"),
    (entries("experts", "mood", layers=1), "layers, the manifest says rank 8 on 1"),
    (entries("experts", "mood", alpha=1.0), "adapter_config.json' is damaged|whose alpha in the manifest is 1"),
    (entries("experts", "mood", alpha=float("nan")), "NaN is no JSON value"),
    (gate(temperature=0), "gate.sequence.temperature: Input should be greater than or equal to 0.001"),
    (gate(min_confidence="x"), "gate.sequence.min_confidence: Input should be a valid number"),
    (gate(type="oracle"), "gate: Input tag 'oracle'"),
    (gate(pairs=10**12), "its gate has 1000000000000 pairs of tokens"),
    (gate(block=10**9), "its gate reads block 1000000000 of 3"),
    *[(adapter(lora_alpha=value), "adapter_config.json' is damaged: lora_alpha: Input should be|" + said)
      for value, said in ((1e300, "less"), (-16.0, "greater"), (0, "greater"), ("16", "number"), (None, "number"))],
    *[(adapter(**{name: value}), "adapter_config.json' is damaged| is no JSON value")
      for name, value in (("lora_alpha", float("nan")), ("lora_alpha", float("inf")),
                          ("base_model_name_or_path", float("inf")))],
    (adapter(lora_alpha=32.0), "it says rank 8 and alpha 32|whose alpha in the manifest is 16"),
    (adapter(r=4), "it says rank 4 and alpha 16|whose rank is 8"),
    (adapter(alpha_pattern=3), "alpha_pattern: Input should be a valid dictionary"),
    (adapter(rank_pattern={"(a+)+$": 8}), "without repeated groups"),
    (adapter(base_model_name_or_path=5), "base_model_name_or_path: Input should be a valid string"),
    (adapter(use_dora=True), "has use_dora=True: DoRA also rescales the frozen weight"),
    (tensors(MOOD, with_number(float("nan"))), NOT_FINITE.format("model.safetensors")),
    (tensors("heads/mood.safetensors", with_number(float("inf"))), NOT_FINITE.format("mood.safetensors")),
    (tensors(MOOD, first(lambda tensor: tensor * 1e19)), "expected numbers within 1e+06"),
    (tensors(MOOD, first(lambda tensor: torch.tensor(1.0))), "of|are ()|expected (r, inputs) and (outputs, r)"),
    (tensors(MOOD, first(lambda tensor: tensor.to(torch.int64))), "has the data type int64, expected float32"),
    (tensors(MOOD, first(lambda tensor: tensor.to(torch.complex64))), "has the data type complex64"),
    (tensors(MOOD, first(lambda tensor: tensor.to(torch.float8_e4m3fn))), "has the data type float8_e4m3fn"),
    (tensors(MOOD, without("layer.0.attention.self.query.lora_A")), "it has B of |query' but not A"),
    (tensors(MOOD, without("layer.0.attention.self.query.lora_")), "layers, the manifest says rank 8"),
    (tensors(MOOD, without("lora_")), "it has rank 0 on 0 layers"),
    (tensors("heads/mood.safetensors", first(lambda tensor: tensor.to(torch.int64))), "has the data type int64"),
    (tensors("heads/mood.safetensors", first(lambda tensor: tensor.to(torch.float64))), "is torch.float64"),
    (tensors("heads/mood.safetensors", first(lambda tensor: tensor * 1e19)), "expected numbers within 1e+06"),
    (tensors("gate.safetensors", first(lambda tensor: tensor.to(torch.float64))), "is torch.float64"),
    (other_head, "mood.safetensors' does not fit the labels of its task"),
    (other_kind, "about.yaml' is damaged: its kind is 'classification', manifest.json says 'multi_label'"),
    (swapped, "was changed: experts/|/adapter_model.safetensors has sha256|, its manifest says"),
    (linked, "holds heads/mood.safetensors as a link to|outside of the folder"),
    (unlisted, "holds tokenizer/added_tokens.json, which its manifest does not list"),
    (no_json, "adapter_config.json"),
    (lambda folder: (folder / "metrics.json").write_text("{"), "metrics.json' is damaged"),
    (lambda folder: (folder / "metrics.json").write_text('{"mood": 1}'), "metrics.json' is damaged: "),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), DAMAGES)
def test_a_damaged_checkpoint_is_refused(copied, spoil, said):
    spoil(copied)
    text = damaged(copied)
    assert [part for part in said.split("|") if part not in text] == [], text


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
    manifest = manifest_of(copied)
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
