"""Everything works offline with local paths; a missing file is named."""

import re
import socket

import pytest
from toys import run, write_toy

import sparse_ft
from sparse_ft.errors import SparseFTError


def test_no_command_opens_a_connection(tmp_path, tiny_bert, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network used: {args}")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tasks = [write_toy(tmp_path, name, sizes=(16, 8, 8)) for name in ("mood", "names")]
    path = run(tasks, tiny_bert, tmp_path / "out", train__epochs=1, experts__word_shapes=False).path
    assert set(sparse_ft.evaluate(path, device="cpu").tasks) == {"mood", "names"}
    model = sparse_ft.load(path, device="cpu")
    assert model.predict(["the table loved"], "all")[0].tasks.keys() == {"mood", "names"}
    assert (sparse_ft.merge([path], method="linear", output=tmp_path / "merged").path / "manifest.json").is_file()
    assert (sparse_ft.export(path, format="peft", output=tmp_path / "peft").path / "mood").is_dir()


def train(folder, backbone, *, tasks=None, data=None):
    tasks = tasks or [write_toy(folder, "mood", sizes=(4, 4, 4))]
    sparse_ft.train(tasks, data=data, backbone=str(backbone), output=folder / "out", device="cpu")


@pytest.mark.parametrize(("command", "missing"), [
    (lambda folder, _: train(folder, folder / "gone"), "gone"),
    (lambda folder, backbone: train(folder, backbone, tasks=[str(folder / "gone.yaml")]), "gone.yaml"),
    (lambda folder, backbone: train(folder, backbone, data=str(folder / "gone.csv")), "gone.csv"),
    (lambda folder, _: sparse_ft.load(folder / "gone"), "gone"),
    (lambda folder, _: sparse_ft.evaluate(folder / "gone"), "gone"),
    (lambda folder, _: sparse_ft.merge([folder / "gone"], method="linear", output=folder / "out"), "gone"),
    (lambda folder, _: sparse_ft.export(folder / "gone", format="peft", output=folder / "out"), "gone"),
])  # fmt: skip
def test_a_missing_file_is_named(tmp_path, tiny_bert, command, missing):
    with pytest.raises(SparseFTError, match=re.escape(str(tmp_path / missing))):
        command(tmp_path, tiny_bert)
    assert not (tmp_path / "out").exists()
