"""A checkpoint as a component of a spaCy pipeline."""

import pickle
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


def spans(doc):
    return [(entity.label_, entity.start_char, entity.end_char) for entity in doc.ents]


def test_docs_get_what_the_model_says(nlp, model):
    answers = model.predict(TEXTS, ["names"])
    moods, subjects = model.probabilities(TEXTS, "mood"), model.probabilities(TEXTS, "about")
    for index, doc in enumerate(nlp.pipe(TEXTS, batch_size=2)):
        entities = answers[index].tasks["names"]["entities"]
        assert spans(doc) == [(entity["type"], entity["start"], entity["end"]) for entity in entities]
        expected = dict(zip(["mood:bad", "mood:good"], moods[index].tolist(), strict=True))
        expected |= {
            f"about:{label}": float(subjects[index][at]) for at, label in enumerate(model.tasks["about"].label_names)
        }
        assert doc.cats == pytest.approx(expected, abs=1e-5)
    assert any(answer.tasks["names"]["entities"] for answer in answers)


def test_entities_of_earlier_components_stay(toys):
    nlp = pipeline_of(toys, tasks=["names"])
    nlp.add_pipe("entity_ruler", first=True).add_patterns([{"label": "WORK", "pattern": "music"}])
    assert ("WORK", 28, 33) in spans(nlp(TEXTS[3]))
    found = spans(nlp("music of Ada"))
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
    with pytest.raises(ConfigError, match="'pick'"):
        pipeline_of(tmp_path / "out", tasks=["pick"])


def test_the_backbone_may_have_moved(toys, tmp_path, tiny_bert, monkeypatch):
    shutil.copytree(tiny_bert, tmp_path / "moved")
    nlp = pipeline_of(toys, backbone=str(tmp_path / "moved"))
    assert nlp.get_pipe("sparse_ft").loaded.checkpoint.model.backbone.name == str(tmp_path / "moved")
    monkeypatch.chdir(toys.parent)
    assert Path(pipeline_of(toys.name).get_pipe("sparse_ft").settings["checkpoint"]) == toys


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


def test_a_pipeline_is_read_from_another_folder_and_its_settings_may_be_changed(tmp_path, toys, monkeypatch):
    shutil.copytree(toys, tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    first = pipeline_of("first")
    first.to_disk(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = spacy.load("../saved")
    for text in TEXTS:
        assert spans(again(text)) == spans(first(text))
        assert again(text).cats == first(text).cats
    changed = {"components": {"sparse_ft": {"tasks": ["mood"], "alignment": "strict"}}}
    narrower = spacy.load("../saved", config=changed)
    assert set(narrower(TEXTS[0]).cats) == {"mood:bad", "mood:good"}
    assert set(pipeline_of(toys, tasks=["mood"]).from_bytes(first.to_bytes())(TEXTS[0]).cats) == {
        "mood:bad",
        "mood:good",
    }  # what its own config says
    (tmp_path / "first").rename(tmp_path / "second")
    moved = {"components": {"sparse_ft": {"checkpoint": str(tmp_path / "second")}}}
    assert len(spacy.load("../saved", config=moved)(TEXTS[0]).cats) > 2
    gone = spacy.load("../saved")
    with pytest.raises(CheckpointError, match="first' does not exist"):
        gone(TEXTS[0])


@pytest.mark.parametrize(("settings", "message"), [
    ({"tasks": ["moood"]}, r"'moood'\. Did you mean 'mood'\?"),
    ({"tasks": ["reply"]}, "'reply'"),
    ({"alignment": "expnd"}, r"'expnd'\. Did you mean 'expand'\?"),
    ({"checkpoint": ""}, "no checkpoint"),
])  # fmt: skip
def test_mistakes_are_explained(toys, settings, message):
    with pytest.raises(ConfigError, match=message):
        pipeline_of(**{"checkpoint": toys, **settings})


def test_spacy_finds_the_component_of_an_installed_package():
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        pytest.skip("the tests run without the project file")
    entries = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"]["spacy_factories"]
    assert entries == {"sparse_ft": f"sparse_ft.integrations.spacy_component:{spacy_component.make_component.__name__}"}


def test_a_pickled_pipeline_loads_its_model_again(nlp):
    (before,) = nlp.pipe(TEXTS[:1])
    content = pickle.dumps(nlp)
    assert len(content) < 1_000_000  # settings and vocabulary, no model
    (after,) = pickle.loads(content).pipe(TEXTS[:1])
    assert after.cats == before.cats
    assert spans(after) == spans(before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_several_processes_answer_after_a_first_call(nlp):
    alone = [doc.cats for doc in nlp.pipe(TEXTS)]
    for cats, expected in zip((doc.cats for doc in nlp.pipe(TEXTS, n_process=2, batch_size=2)), alone, strict=True):
        assert cats == pytest.approx(expected, abs=1e-5)
