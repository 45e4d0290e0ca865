"""The search finds weights and density on validation rows, and on nothing else."""

import sys

import pytest

import sparse_ft
import sparse_ft.merging.search as module
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.merging.merge import merge

pytest.importorskip("optuna")


@pytest.fixture
def parts(toys):
    return [toys / "experts/mood", toys / "experts/names"]


def searched(parts, output, **changes):
    options = {"method": "ties", "search": True, "budget": 8, "device": "cpu", **changes}
    return merge(parts, output=output, **options)


def test_the_best_trial_on_validation_rows_is_written(parts, tmp_path, capsys, monkeypatch):
    seen, read = [], module.read

    def watched(spec, *, data, splits):
        seen.append((spec.name, tuple(splits)))
        return read(spec, data=data, splits=splits)

    monkeypatch.setattr(module, "read", watched)
    search = searched(parts, tmp_path / "out").search
    assert seen == [("mood", ("validation",)), ("names", ("validation",))]
    scores = sparse_ft.evaluate(tmp_path / "out", split="validation", device="cpu").tasks
    assert search.trials == 8
    assert search.score == pytest.approx(
        (scores["mood"].score.metrics["accuracy"] + scores["names"].score.metrics["f1"]) / 2
    )
    assert search.score > search.start  # equal weights and half of the entries are not the best for these two
    again = {"weights": search.settings.weights, "density": search.settings.density}
    merge(parts, method="ties", output=tmp_path / "typed", **again)
    written = [tmp_path / name / "experts/merged/adapter_model.safetensors" for name in ("out", "typed")]
    assert written[0].read_bytes() == written[1].read_bytes()
    captured = capsys.readouterr()
    assert "searching" in captured.err
    assert captured.out == ""


def test_a_seed_gives_the_same_again(parts, tmp_path):
    few = {"budget": 3, "rows": 4}
    one, again, two = (
        searched(parts, tmp_path / name, seed=seed, **few).search for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == again != two


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"budget": 1}, ConfigError, "budget: Input should be"),
    ({"rows": 0}, ConfigError, "rows: Input should be"),
    ({"method": "model_stock"}, ConfigError, "model_stock"),
    ({}, DataError, "'mood' has no validation rows"),
    ({"method": "linear"}, ConfigError, r"pip install 'sparse-ft\[search\]'"),
])  # fmt: skip
def test_a_search_that_cannot_be_made_is_refused(parts, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.setattr(module, "read", lambda spec, *, data, splits: {})
    if changes == {"method": "linear"}:
        monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(error, match=message):
        searched(parts, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
