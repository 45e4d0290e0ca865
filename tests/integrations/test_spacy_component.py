"""A checkpoint as a component of a spaCy pipeline."""

import shutil
import tomllib
from pathlib import Path

import pytest

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.tasks.spec import parse_task

spacy = pytest.importorskip("spacy", reason="the extra `spacy` is not installed")

from sparse_ft.integrations import spacy_component  # noqa: E402  # needs spaCy

TEXTS = [
    "Ada met Mozart in Lisbon",
    "the table loved",
    "",
    "half boring of Geneva, then music",
    "Charles Babbage in London",
]


@pytest.fixture(scope="module")
def model(toys):
    return sparse_ft.load(toys, device="cpu")


def pipeline_of(checkpoint, **settings):
    nlp = spacy.blank("en")
    nlp.add_pipe("sparse_ft", config={"checkpoint": str(checkpoint), "device": "cpu", **settings})
    return nlp


@pytest.fixture(scope="module")
def nlp(toys):
    return pipeline_of(toys)


def places(doc):
    return [(entity.label_, entity.start_char, entity.end_char) for entity in doc.ents]


def test_docs_get_what_the_model_says(nlp, model):
    answers = model.predict(TEXTS, ["names"])
    moods, subjects = model.probabilities(TEXTS, "mood"), model.probabilities(TEXTS, "about")
    for place, doc in enumerate(nlp.pipe(TEXTS, batch_size=2)):
        entities = answers[place].tasks["names"]["entities"]
        assert places(doc) == [(entity["type"], entity["start"], entity["end"]) for entity in entities]
        expected = dict(zip(["mood:bad", "mood:good"], moods[place].tolist(), strict=True))
        expected |= {
            f"about:{label}": float(subjects[place][at]) for at, label in enumerate(model.tasks["about"].label_names)
        }
        assert doc.cats == pytest.approx(expected, abs=1e-5)
    assert any(answer.tasks["names"]["entities"] for answer in answers)


def test_one_doc_is_as_in_a_batch(nlp):
    for text, doc in zip(TEXTS, nlp.pipe(TEXTS), strict=True):
        alone = nlp(text)
        assert places(alone) == places(doc)
        assert alone.cats == pytest.approx(doc.cats, abs=1e-5)


def test_entities_of_earlier_components_stay(toys):
    nlp = pipeline_of(toys, tasks=["names"])
    nlp.add_pipe("entity_ruler", first=True).add_patterns([{"label": "WORK", "pattern": "music"}])
    assert ("WORK", 28, 33) in places(nlp(TEXTS[3]))
    found = places(nlp("music of Ada"))
    assert found[0] == ("WORK", 0, 5)
    assert len(found) > 1


def test_all_tasks_are_those_on_one_text(toys, tmp_path):
    loaded = load_checkpoint(toys)
    pairs = {"text": "question", "choices": "options", "answer": "label"}
    values = {"name": "pick", "kind": "multiple_choice", "columns": pairs, "metric": "accuracy"}
    loaded.model.add_task("pick", expert="mood", level="text", num_outputs=1)
    tasks = {**loaded.tasks, "pick": parse_task(values, where="pick")}
    save_checkpoint(tmp_path / "out", model=loaded.model, tasks=tasks, config=loaded.config, metrics={})
    assert pipeline_of(tmp_path / "out")(TEXTS[0]).cats
    with pytest.raises(ConfigError, match="Unknown task on single texts 'pick'"):
        pipeline_of(tmp_path / "out", tasks=["pick"])


def test_the_backbone_may_have_moved(toys, tmp_path, tiny_bert, monkeypatch):
    shutil.copytree(tiny_bert, tmp_path / "moved")
    nlp = pipeline_of(toys, backbone=str(tmp_path / "moved"))
    assert nlp.get_pipe("sparse_ft").loaded.checkpoint.model.backbone.name == str(tmp_path / "moved")
    monkeypatch.chdir(toys.parent)
    assert Path(pipeline_of(toys.name).get_pipe("sparse_ft").settings["checkpoint"]) == toys


def test_tasks_can_be_chosen(toys):
    doc = pipeline_of(toys, tasks=["mood"])(TEXTS[0])
    assert set(doc.cats) == {"mood:good", "mood:bad"}
    assert not doc.ents
    doc = pipeline_of(toys, tasks="names")(TEXTS[0])
    assert not doc.cats
    assert doc.ents


@pytest.mark.parametrize(("alignment", "expected"), [("expand", ["Ada-Lovelace"]), ("contract", []), ("strict", [])])
def test_entities_inside_a_token_are_aligned(toys, monkeypatch, alignment, expected):
    """spaCy's tokenizer is made to keep together what ours splits at the hyphen."""
    nlp = pipeline_of(toys, alignment=alignment, tasks=["names"])
    nlp.tokenizer = spacy.tokenizer.Tokenizer(nlp.vocab)  # splits at white space only
    component = nlp.get_pipe("sparse_ft")
    text = "then Ada-Lovelace in London"
    answer = {"entities": [{"type": "PER", "text": "Ada", "start": 5, "end": 8, "score": 1.0}]}
    monkeypatch.setattr(
        component.loaded, "predict", lambda texts, tasks: [sparse_ft.Prediction(text, {"names": answer}, {})]
    )
    assert [entity.text for entity in nlp(text).ents] == expected


def test_it_is_written_with_its_pipeline_and_read_again(tmp_path, nlp, toys):
    nlp.to_disk(tmp_path / "saved")
    again = spacy.load(tmp_path / "saved")
    assert again.get_pipe("sparse_ft").settings["checkpoint"] == str(toys)
    for text in TEXTS:
        assert places(again(text)) == places(nlp(text))
        assert again(text).cats == nlp(text).cats
    other = pipeline_of(toys).from_bytes(nlp.to_bytes())
    assert places(other(TEXTS[0])) == places(nlp(TEXTS[0]))
    narrower = pipeline_of(toys, tasks=["mood"]).from_bytes(nlp.to_bytes())
    assert set(narrower(TEXTS[0]).cats) == {"mood:bad", "mood:good"}  # what its own config says


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"tasks": ["moood"]}, ConfigError, r"Unknown task on single texts 'moood'\. Did you mean 'mood'\?"),
    ({"tasks": ["reply"]}, ConfigError, "Unknown task on single texts 'reply'"),
    ({"alignment": "expnd"}, ConfigError, r"Unknown alignment 'expnd'\. Did you mean 'expand'\?"),
    ({"checkpoint": ""}, ConfigError, "names no checkpoint"),
])  # fmt: skip
def test_mistakes_are_explained(toys, settings, error, message):
    with pytest.raises(error, match=message):
        pipeline_of(**{"checkpoint": toys, **settings})


def test_a_pipeline_is_read_from_another_folder_and_its_settings_may_be_changed(tmp_path, toys, monkeypatch):
    shutil.copytree(toys, tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    pipeline_of("first").to_disk(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    changed = {"tasks": ["mood"], "alignment": "strict"}
    assert set(spacy.load("../saved", config={"components": {"sparse_ft": changed}})(TEXTS[0]).cats) == {
        "mood:bad",
        "mood:good",
    }
    assert len(spacy.load("../saved")(TEXTS[0]).cats) > 2
    (tmp_path / "first").rename(tmp_path / "second")
    moved = {"components": {"sparse_ft": {"checkpoint": str(tmp_path / "second")}}}
    again = spacy.load("../saved", config=moved)
    assert len(again(TEXTS[0]).cats) > 2
    again.to_disk(tmp_path / "saved again")
    assert len(spacy.load("../saved again")(TEXTS[0]).cats) > 2
    gone = spacy.load("../saved")
    with pytest.raises(CheckpointError, match="first' does not exist"):
        gone(TEXTS[0])


def test_a_checkpoint_that_is_not_there_is_missed_with_the_first_doc():
    nlp = pipeline_of("nowhere")
    with pytest.raises(CheckpointError, match="nowhere' does not exist"):
        nlp(TEXTS[0])


def test_spacy_finds_the_component_of_an_installed_package():
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        pytest.skip("the tests run without the project file")
    entries = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"]["spacy_factories"]
    assert entries == {"sparse_ft": f"sparse_ft.integrations.spacy_component:{spacy_component.make_component.__name__}"}
