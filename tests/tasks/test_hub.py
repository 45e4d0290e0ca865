"""Text files of a data set on the hub are fetched one by one and read as they stand; others are left to the library."""

from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from sparse_ft.errors import DataError
from sparse_ft.tasks.hub import load_hub
from sparse_ft.tasks.spec import HubSource

COLUMNS = {"text": "text", "label": "label"}


def builder(*files, features=None, sep=","):
    config = SimpleNamespace(data_files={"train": list(files)}, features=None, sep=sep)
    return SimpleNamespace(config=config, info=SimpleNamespace(features=features))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that sets what the library finds, and the list of fetched files."""
    fetched = []

    def fetch(repo, file, *, repo_type, revision):
        fetched.append((repo, file, repo_type, revision))
        path = tmp_path / file.replace("/", "_")
        path.write_text(f"text,label\n{file},01\nb,NA\n")
        return str(path)

    def find(found):
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, name, *, revision, cache_dir: found)
        return load_hub(HubSource(path="me/set"), COLUMNS), fetched

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return find


def test_files_are_fetched_at_their_revision(hub):
    loaded, fetched = hub(builder("hf://datasets/me/set@abc1/data/a.csv", "hf://datasets/me/set@abc1/b.csv"))
    rows = list(loaded["train"])
    assert fetched == [("me/set", "data/a.csv", "dataset", "abc1"), ("me/set", "b.csv", "dataset", "abc1")]
    assert [(row.row, row.values["label"]) for row in rows] == [(0, "01"), (1, "NA"), (2, "01"), (3, "NA")]


@pytest.mark.parametrize("found", [
    builder("hf://datasets/me/set@abc1/a.csv", features={"label": "int"}),
    builder("hf://datasets/me/set@abc1/a.csv", sep=";"),
    builder("hf://datasets/me/set@abc1/a.parquet"),
    builder("hf://datasets/me/set@abc1/a.csv", "s3://a.csv"),
    builder(),
])  # fmt: skip
def test_other_data_sets_are_left_to_the_library(hub, monkeypatch, found):
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, *, revision: datasets.DatasetDict(train=rows))
    loaded, fetched = hub(found)
    assert [row.values for row in loaded["train"]] == [{"text": "a", "label": "x"}]
    assert fetched == []


def test_a_file_that_cannot_be_fetched_is_an_error(hub, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(DataError, match="'me/set' could not be loaded from the hub: no network"):
        hub(builder("hf://datasets/me/set@abc1/a.csv"))
