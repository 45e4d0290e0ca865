"""The sandbox in which the snippets of the documentation run."""

import contextlib
from pathlib import Path

import pytest
import sandbox as files

import sparse_ft
from sparse_ft import resources


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory, tiny_bert) -> Path:
    """A folder with everything that snippets name."""
    folder = tmp_path_factory.mktemp("sandbox")
    files.write_backbone(tiny_bert, folder / "my_backbone")
    files.write_inputs(folder)
    files.write_bundled(folder / "bundled")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "PACKAGE_DIR", folder / "bundled/package")
        files.write_peft_folder(folder / "PEFT_FOLDER")
        files.write_checkpoints()
    return folder


@pytest.fixture
def short_training(sandbox, monkeypatch):
    """Make everything that trains take a second: few rows and a tiny backbone."""
    monkeypatch.setattr(resources, "PACKAGE_DIR", sandbox / "bundled/package")
    train, classifier = sparse_ft.train, sparse_ft.SparseFTClassifier
    short = {"backbone": "my_backbone", "overrides": files.SETTINGS, "device": "cpu"}
    monkeypatch.setattr(sparse_ft, "train", lambda *args, **options: train(*args, **short, **options), raising=False)
    monkeypatch.setattr(
        sparse_ft, "SparseFTClassifier", lambda **options: classifier(**short, **options), raising=False
    )
