"""What a foreign checkpoint or backbone may do: nothing but numbers. Network, processes and stdin are denied."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_checkpoints import sign

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.cli.listing import describe_checkpoint
from sparse_ft.errors import BackboneError, SparseFTError

TEXT = "the table loved"
EVIL = "import pathlib\n\npathlib.Path({marker!r}).touch()\n\n\nclass EvilTokenizer:\n    pass\n"


@pytest.fixture(autouse=True)
def marker(tmp_path, monkeypatch):
    """Deny what numbers need not; return the file that every piece of hostile code would leave."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a checkpoint used {args}")

    class Stdin:
        def __getattr__(self, name):
            raise AssertionError(f"a checkpoint read stdin: {name}")

    for owner, name in (
        (socket.socket, "connect"), (socket, "getaddrinfo"), (subprocess.Popen, "__init__"), (os, "system"),
        (os, "posix_spawn"), (os, "fork"), (os, "execve"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(sys, "stdin", Stdin())
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    marker = tmp_path / "code-has-run"
    yield marker
    assert not marker.exists()


@pytest.fixture
def checkpoint(toys, tmp_path):
    return shutil.copytree(toys, tmp_path / "checkpoint")


def change_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_task(checkpoint, **changes):
    file = checkpoint / "tasks/mood.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))
    sign(checkpoint)


def tokenizer_code(checkpoint, marker, *, tokenizer_class):
    """Name code for the tokenizer; it lies beside the checkpoint, as a checkpoint may not hold it."""
    (checkpoint / "evil.py").write_text(EVIL.format(marker=str(marker)))
    classes = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    change_json(checkpoint / "tokenizer/tokenizer_config.json", auto_map=classes, tokenizer_class=tokenizer_class)
    (checkpoint / "evil.py").unlink()
    sign(checkpoint)


def test_a_tokenizer_never_runs_code(checkpoint, toys, marker):
    expected = sparse_ft.load(toys, device="cpu").predict([TEXT], ["mood"])[0].to_dict()
    known = json.loads((toys / "tokenizer/tokenizer_config.json").read_text())["tokenizer_class"]
    tokenizer_code(checkpoint, marker, tokenizer_class=known)
    model = sparse_ft.load(checkpoint, device="cpu")
    assert model.predict([TEXT], ["mood"])[0].to_dict() == expected
    assert "auto_map" not in model.checkpoint.model.backbone.tokenizer.init_kwargs
    tokenizer_code(checkpoint, marker, tokenizer_class="EvilTokenizer")
    with pytest.raises(BackboneError, match="tokenizer of backbone"):
        sparse_ft.load(checkpoint, device="cpu")


def test_a_backbone_folder_never_runs_code(tmp_path, tiny_bert, marker):
    folder = shutil.copytree(tiny_bert, tmp_path / "backbone")
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    names = {f"Auto{part}": f"evil.Evil{part}" for part in ("Config", "Model")}
    names["AutoTokenizer"] = [None, "evil.EvilTokenizer"]
    change_json(folder / "config.json", auto_map=names)
    change_json(folder / "tokenizer_config.json", auto_map=names)
    assert load_backbone(str(folder)).num_blocks == load_backbone(str(tiny_bert)).num_blocks
    change_json(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    assert load_backbone(str(folder)).tokenizer("fox") == load_backbone(str(tiny_bert)).tokenizer("fox")


def test_every_loader_of_transformers_is_told_to_run_no_code():
    calls = [
        (file.name, node)
        for file in Path(sparse_ft.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".from_pretrained", ".from_config"))
    ]
    loaders = [(name, node) for name, node in calls if not ast.unparse(node).startswith(("PeftModel", "loader.from_"))]
    assert len(loaders) >= 3
    for name, node in loaders:
        assert "trust_remote_code=False" in ast.unparse(node), name


@pytest.mark.parametrize(("file", "changes", "said"), [
    ("config.json", {"attn_implementation": "evil/kernel"}, "has attn_implementation='evil/kernel'"),
    ("config.json", {"_attn_implementation": "evil/kernel"}, "has _attn_implementation='evil/kernel'"),
    ("config.json", {"quantization_config": {"quant_method": "x"}}, "which would load code or weights from elsewhere"),
    ("config.json", {"transformers_weights": "../evil.safetensors"}, "which would load code or weights from elsewhere"),
    ("adapter_config.json", {"base_model_name_or_path": "evil/model"}, "holds an adapter_config.json"),
    ("model.safetensors.index.json", {"weight_map": {"x": "../evil.safetensors"}}, "no file in this folder"),
])  # fmt: skip
def test_a_backbone_folder_loads_nothing_from_elsewhere(tmp_path, tiny_bert, file, changes, said):
    folder = shutil.copytree(tiny_bert, tmp_path / "backbone")
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    change_json(folder / file, **changes)
    with pytest.raises(BackboneError, match=said):
        load_backbone(str(folder))


def test_a_metric_that_is_code_needs_trust(checkpoint, tmp_path, marker):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/evil.py").write_text(EVIL.format(marker=str(marker)))
    change_task(checkpoint, metric=f"evaluate:{tmp_path / 'evil'}")
    assert sparse_ft.load(checkpoint, device="cpu").predict([TEXT], ["mood"])[0].tasks["mood"]["label"] == "good"
    assert "mood" in describe_checkpoint(checkpoint)
    message = "Task 'mood' of the checkpoint is scored by .* add --trust-tasks"
    for run in (
        lambda: sparse_ft.evaluate(checkpoint, tasks="mood", device="cpu"),
        lambda: sparse_ft.train(from_checkpoint=checkpoint, stage="gate", output=tmp_path / "gate", device="cpu"),
        lambda: sparse_ft.train(["mood"], from_checkpoint=checkpoint, output=tmp_path / "more", device="cpu"),
        lambda: sparse_ft.merge([checkpoint], method="linear", evaluate=True, output=tmp_path / "merged"),
    ):
        with pytest.raises(SparseFTError, match=message):
            run()
    assert not [name for name in ("gate", "more", "merged") if (tmp_path / name / "manifest.json").exists()]


def test_a_data_set_on_the_hub_needs_trust(checkpoint):
    change_task(checkpoint, hub={"path": "evil/data"}, files=None)
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    (checkpoint / "config.yaml").write_text(yaml.safe_dump({**config, "sources": {}}))
    sign(checkpoint)
    with pytest.raises(SparseFTError, match=r"names the data set 'evil/data' on the hub.*--trust-tasks"):
        sparse_ft.evaluate(checkpoint, tasks="mood", device="cpu")


def test_yaml_makes_no_objects(checkpoint, marker):
    for name in ("config.yaml", "tasks/mood.yaml"):
        before = (checkpoint / name).read_text()
        (checkpoint / name).write_text(f"{before}\nevil: !!python/object/apply:os.system ['touch {marker}']\n")
        sign(checkpoint)
        with pytest.raises(SparseFTError, match="yaml' is damaged"):
            sparse_ft.load(checkpoint, device="cpu")
        (checkpoint / name).write_text(before)


def pickled(checkpoint, tmp_path):
    (checkpoint / "heads/mood.bin").write_bytes(b"cos\nsystem\n(S'touch code-has-run'\ntR.")


def code_in_a_listed_file(checkpoint, tmp_path):
    (checkpoint / "tokenizer/evil.py").write_text("")
    sign(checkpoint)


def link_out(checkpoint, tmp_path):
    (tmp_path / "secret.txt").write_text((checkpoint / "tokenizer/tokenizer.json").read_text())
    (checkpoint / "tokenizer/tokenizer.json").unlink()
    (checkpoint / "tokenizer/tokenizer.json").symlink_to(tmp_path / "secret.txt")
    sign(checkpoint)


def linked_folder(checkpoint, tmp_path):
    (checkpoint / "heads").rename(tmp_path / "elsewhere")
    (checkpoint / "heads").symlink_to(tmp_path / "elsewhere")


def other_path(checkpoint, tmp_path):
    sizes = json.loads((checkpoint / "manifest.json").read_text())["bytes"]
    change_json(checkpoint / "manifest.json", bytes={**sizes, "../../../etc/passwd": 1})


def name_as_path(checkpoint, tmp_path):
    tasks = json.loads((checkpoint / "manifest.json").read_text())["tasks"]
    change_json(checkpoint / "manifest.json", tasks={**tasks, "../../evil": tasks["mood"]})


@pytest.mark.parametrize(("attack", "said"), [
    (pickled, "holds heads/mood.bin, which its manifest does not list"),
    (code_in_a_listed_file, "a checkpoint holds only"),
    (link_out, "holds tokenizer/tokenizer.json as a link to"),
    (linked_folder, "as a link to"),
    (other_path, "expected the path of a file inside the checkpoint"),
    (name_as_path, "The name '../../evil' is not allowed"),
])  # fmt: skip
def test_what_a_checkpoint_may_not_hold(checkpoint, tmp_path, attack, said):
    attack(checkpoint, tmp_path)
    for read in (sparse_ft.load, describe_checkpoint):
        with pytest.raises(SparseFTError) as caught:
            read(checkpoint)
        assert said in str(caught.value)
