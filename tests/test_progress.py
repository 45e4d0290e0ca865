"""Progress bars, and what silences them."""

import datasets
import pytest
import transformers

from sparse_ft.progress import progress_bar


@pytest.fixture
def shown(capsys):
    def show(title="training", **options):
        capsys.readouterr()
        with progress_bar(title, total=2, phase=False, **options) as bar:
            bar.update(2)
        return capsys.readouterr().err

    return show


def test_a_bar_is_shown_on_stderr(shown):
    assert "training: 100%" in shown()
    assert shown(None) == ""


@pytest.mark.parametrize(("name", "value"), [("TQDM_DISABLE", "1"), ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")])
def test_the_environment_silences_bars(shown, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert shown() == ""
    monkeypatch.setenv(name, "0")
    assert "training" in shown()


@pytest.mark.parametrize(("silence", "speak"), [
    (datasets.disable_progress_bars, datasets.enable_progress_bars),
    (transformers.utils.logging.disable_progress_bar, transformers.utils.logging.enable_progress_bar),
])  # fmt: skip
def test_the_switches_of_the_libraries_silence_bars(shown, silence, speak):
    silence()
    try:
        assert shown() == ""
    finally:
        speak()
    assert "training" in shown()


def test_a_short_phase_shows_no_bar(capsys, monkeypatch):
    with progress_bar("scoring", total=2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sparse_ft.progress._DELAY", 1e-9)
    with progress_bar("scoring", total=2) as bar:
        bar.update(1)
        bar.refresh()
    assert "scoring:  50%" in capsys.readouterr().err
