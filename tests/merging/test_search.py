"""The search finds weights and density on validation rows, and on nothing else."""

import sys

import pytest

import sparse_ft
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.merging.merge import merge

pytest.importorskip("optuna")


@pytest.fixture
def parts(toys):
    return [toys / "experts/mood", toys / "experts/names"]


def validation_score(path):
    scores = sparse_ft.evaluate(path, split="validation", device="cpu").tasks
    return (scores["mood"].score.metrics["accuracy"] + scores["names"].score.metrics["f1"]) / 2


def searched(parts, output, **changes):
    return merge(parts, method="ties", search=True, output=output, device="cpu", **{"budget": 8, **changes})


def test_what_is_found_is_the_best_that_was_tried_and_is_what_is_written(parts, tmp_path, capsys):
    result = searched(parts, tmp_path / "out")
    found = result.search
    assert found.trials == 8
    assert found.score == pytest.approx(validation_score(tmp_path / "out"))
    merge(parts, method="ties", output=tmp_path / "equal")
    assert found.start == pytest.approx(validation_score(tmp_path / "equal"))
    assert found.score > found.start  # equal weights and half of the entries are not the best for these two
    again = {"weights": found.settings.weights, "density": found.settings.density}
    merge(parts, method="ties", output=tmp_path / "typed", **again)
    written = [tmp_path / name / "experts/merged/adapter_model.safetensors" for name in ("out", "typed")]
    assert written[0].read_bytes() == written[1].read_bytes()
    assert result.changes[1].startswith("Found in 8 trials on validation rows: mean score 0.")
    captured = capsys.readouterr()
    assert "searching" in captured.err
    assert captured.out == ""


def test_a_seed_gives_the_same_again(parts, tmp_path):
    one, again = (searched(parts, tmp_path / name, budget=4, rows=8).search for name in ("one", "again"))
    assert one == again
    assert one != searched(parts, tmp_path / "two", budget=4, rows=8, seed=2).search


def test_no_split_but_validation_is_read(parts, tmp_path, monkeypatch):
    import sparse_ft.merging.search as module

    seen, read = [], module.read

    def watched(spec, *, data, splits):
        seen.append((spec.name, tuple(splits)))
        return read(spec, data=data, splits=splits)

    monkeypatch.setattr(module, "read", watched)
    searched(parts, tmp_path / "out", budget=2)
    assert seen == [("mood", ("validation",)), ("names", ("validation",))]


@pytest.mark.parametrize(("changes", "message"), [
    ({"budget": 1}, "--budget is 1 and --rows 500. Expected 2 trials and 1 row at least."),
    ({"rows": 0}, "--budget is 8 and --rows 0."),
])  # fmt: skip
def test_a_search_that_cannot_be_made_is_refused(parts, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        searched(parts, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_method_with_nothing_to_search_is_refused(parts, tmp_path):
    with pytest.raises(ConfigError, match="model_stock has neither weights nor a density to search"):
        merge(parts, method="model_stock", search=True, output=tmp_path / "out", device="cpu")


def test_without_optuna_the_message_names_the_command(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"--search needs Optuna. Install it: pip install 'sparse-ft\[search\]'"):
        searched(parts, tmp_path / "out")


def test_without_validation_rows_it_is_refused(parts, tmp_path, monkeypatch):
    import sparse_ft.merging.search as module

    monkeypatch.setattr(module, "read", lambda spec, *, data, splits: {})
    with pytest.raises(DataError, match="Task 'mood' has no validation rows with answers, which --search needs"):
        searched(parts, tmp_path / "out")
