"""The scikit-learn estimator, on a tiny backbone and on toy rows whose answer hangs on one word."""

import copy
import io
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_array, check_is_fitted
from toys import settings, toy_rows

import sparse_ft
from sparse_ft import SparseFTClassifier
from sparse_ft.errors import BackboneError, ConfigError
from sparse_ft.integrations.sklearn_estimator import _held_out

ROWS = toy_rows("mood", 160)
TEXTS, MOODS = [row["text"] for row in ROWS], [row["label"] for row in ROWS]
TEST = toy_rows("mood", 60, seed=2)
TEST_TEXTS, TEST_MOODS = [row["text"] for row in TEST], [row["label"] for row in TEST]


@pytest.fixture(scope="module")
def make(tiny_bert):
    """Return ``make(**parameters)``: an estimator whose fit takes a moment."""

    def build(**parameters):
        options = settings(train__epochs=1, experts__first_block=2)
        return SparseFTClassifier(
            **{"backbone": str(tiny_bert), "overrides": options, "device": "cpu", "random_state": 0, **parameters}
        )

    return build


@pytest.fixture(scope="module")
def fitted(make):
    """An estimator that has learnt the task; nobody may change it."""
    return make(overrides=settings(train__epochs=6, train__batch_size=8, train__learning_rate=0.005)).fit(TEXTS, MOODS)


def test_it_learns_and_its_methods_agree(fitted):
    assert list(fitted.classes_) == ["bad", "good"]
    probabilities, answers = fitted.predict_proba(TEST_TEXTS), fitted.predict(TEST_TEXTS)
    assert probabilities.shape == (60, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert list(answers) == [fitted.classes_[best] for best in probabilities.argmax(1)]
    assert fitted.score(TEST_TEXTS, TEST_MOODS) == np.mean(answers == np.array(TEST_MOODS)) > 0.85


@pytest.mark.parametrize("copied", [
    lambda model: pickle.loads(pickle.dumps(model)),
    copy.deepcopy,
    lambda model: joblib.load(io.BytesIO(dumped(model))),
])  # fmt: skip
def test_a_fitted_estimator_survives_a_copy(fitted, copied):
    again = copied(fitted)
    assert again.get_params() == fitted.get_params()
    np.testing.assert_array_equal(again.predict_proba(TEST_TEXTS), fitted.predict_proba(TEST_TEXTS))


def dumped(model) -> bytes:
    stream = io.BytesIO()
    joblib.dump(model, stream)
    return stream.getvalue()


def test_a_fit_that_fails_leaves_the_fitted_state(make, fitted, monkeypatch):
    again, fresh = pickle.loads(pickle.dumps(fitted)), make()
    monkeypatch.setattr("sparse_ft.integrations.sklearn_estimator.train", lambda *_, **__: 1 / 0)
    for one in (again, fresh):
        with pytest.raises(ZeroDivisionError):
            one.fit(TEXTS, ["dog" if mood == "bad" else "cat" for mood in MOODS])
    assert list(again.classes_) == ["bad", "good"]
    assert list(again.predict(TEST_TEXTS[:4])) == list(fitted.predict(TEST_TEXTS[:4]))
    with pytest.raises(NotFittedError):
        fresh.predict(TEST_TEXTS)


def test_the_state_has_neither_backbone_nor_rows_in_it(fitted, tiny_bert):
    backbone = (tiny_bert / "model.safetensors").stat().st_size
    assert set(fitted.__getstate__()) == {*fitted.get_params(), "classes_", "checkpoint_", "backbone_"}
    for name, content in fitted.checkpoint_.items():
        assert len(content) < backbone, name
        assert b"train.jsonl" not in content, name
        assert TEXTS[0].encode() not in content, name


def test_the_fitted_state_can_be_saved_as_a_checkpoint(fitted, tmp_path):
    path = fitted.save(tmp_path / "saved")
    answers = sparse_ft.load(path, device="cpu").predict(TEST_TEXTS, "classifier")
    assert [answer.tasks["classifier"]["label"] for answer in answers] == list(fitted.predict(TEST_TEXTS))
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        fitted.save(path)


def test_rows_are_held_out_from_every_class_and_none_is_held_out_whole():
    texts = [*(f"a{row}" for row in range(40)), *["b"] * 12, *(f"c{row}" for row in range(9)), "d", "d"]
    classes = [0] * 40 + [1] * 12 + [2] * 9 + [3] * 2
    held = _held_out(texts, classes)
    # A tenth; none where all rows have one text, or where there are too few.
    assert [sum(np.array(held)[np.array(classes) == one]) for one in range(4)] == [4, 0, 0, 0]
    assert held == _held_out(texts, classes)


def test_two_rows_teach_two_classes(make):
    options = settings(train__epochs=12, train__batch_size=4)
    assert list(make(overrides=options).fit(["a", "b"], [0, 1]).predict(["a", "b"])) == [0, 1]


def test_the_backbone_may_move_after_the_fit(make, tmp_path, tiny_bert, monkeypatch):
    shutil.copytree(tiny_bert, tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(make(backbone="./here").fit(TEXTS[:8], MOODS[:8]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(pickle.loads(content).predict(TEXTS[:2])) == 2  # the checkpoint knows the whole path
    (tmp_path / "here").rename(tmp_path / "moved")
    with pytest.raises(BackboneError, match="here' does not exist"):
        pickle.loads(content).predict(TEXTS[:2])
    assert len(pickle.loads(content).set_params(backbone="../moved").predict(TEXTS[:2])) == 2


def test_the_same_random_state_gives_the_same_model(make):
    one, other, third = (make(random_state=seed).fit(TEXTS[:16], MOODS[:16]) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.predict_proba(TEST_TEXTS), other.predict_proba(TEST_TEXTS))
    assert (one.predict_proba(TEST_TEXTS) != third.predict_proba(TEST_TEXTS)).any()


def test_parameters_reach_the_run(make):
    few = ["train.precision=fp32"]
    model = clone(make(rank=3, epochs=2, learning_rate=0.004, overrides=few)).set_params(rank=5)
    config = model.fit(TEXTS[:8], MOODS[:8]).model.checkpoint.config
    assert (config.experts.rank, config.train.epochs, config.train.learning_rate) == (5, 2, 0.004)
    assert config.train.min_steps == 0  # epochs that are set are all that there are


def test_it_works_in_a_search_over_a_pipeline(make):
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    search = GridSearchCV(
        make_pipeline(lower, make()), {"sparseftclassifier__rank": [1, 4]}, cv=2, error_score="raise"
    ).fit(np.array(TEXTS[:12]), MOODS[:12])
    assert search.best_params_["sparseftclassifier__rank"] in (1, 4)
    assert search.predict(TEST_TEXTS[:3]).shape == (3,)


@pytest.mark.parametrize("labels", [[True, False], ["yes", " "]])
def test_labels_come_back_as_they_are(make, labels):
    given = np.array([labels[mood == "good"] for mood in MOODS[:12]])
    model = make().fit(TEXTS[:12], given)
    assert model.classes_.dtype == given.dtype
    assert set(model.predict(TEST_TEXTS)) <= set(labels)


@pytest.mark.parametrize(("texts", "labels", "message"), [
    ("one text", ["a"], "got a single str"),
    ([1, 2], ["a", "b"], "got int: 1"),
    ([["a"], ["b"]], ["a", "b"], "got list"),
    (np.array([["a"], ["b"]]), ["a", "b"], r"\(2, 1\)"),
    ([], [], "0 samples"),
    (["a", "b"], ["a"], "inconsistent numbers of samples"),
    (["a", "b"], ["a", "a"], "one class"),
    (["a", "b"], [0.1, 0.2], "continuous"),
    (["a", "b"], None, "requires y to be passed"),
])  # fmt: skip
def test_rows_that_cannot_be_fitted_are_refused(make, texts, labels, message):
    with pytest.raises(ValueError, match=message):
        make().fit(texts, labels)


@pytest.mark.parametrize(("parameters", "error", "message"), [
    ({"backbone": "./nowhere"}, BackboneError, "'./nowhere' does not exist"),
    ({"rank": -1}, ConfigError, "experts"),
])  # fmt: skip
def test_wrong_settings_are_explained_when_fitting(make, parameters, error, message):
    with pytest.raises(error, match=message):
        make(**parameters).fit(TEXTS[:8], MOODS[:8])


# scikit-learn's own checks. Nearly all of them feed numbers, so they skip an estimator for texts; here each number
# becomes a word. Those on the number of features (check_n_features_in, …_after_fitting, check_classifiers_train) fail,
# for a text has none; all others pass, and the quick ones of them are here.


class OnNumbers(SparseFTClassifier):
    """Reads a row of numbers as a text."""

    def fit(self, X, y):
        return super().fit(as_texts(X), y)

    def predict_proba(self, X):
        check_is_fitted(self)
        return super().predict_proba(as_texts(X))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array, tags.input_tags.string = True, False, False
        return tags


def as_texts(rows):
    words = ["the", "first", "second", "half", "loved", "boring", "table", "company"]
    return [" ".join(words[int(abs(value) * 3) % 8] for value in row[:6]) for row in check_array(rows)]


CHECKS = [
    "check_classifiers_one_label",
    "check_classifiers_regression_target",
    "check_dict_unchanged",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_dont_overwrite_parameters",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_sparse_array",
    "check_estimators_empty_data_messages",
    "check_estimators_fit_returns_self",
    "check_estimators_pickle",
    "check_estimators_unfitted",
    "check_fit2d_1sample",
    "check_fit_idempotent",
    "check_fit_score_takes_y",
    "check_get_params_invariance",
    "check_methods_subset_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_requires_y_none",
    "check_set_params",
    "check_supervised_y_no_nan",
    "check_valid_tag_types",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHECKS)
def test_a_check_of_scikit_learn_passes(tiny_bert, name):
    options = settings(train__epochs=1, train__batch_size=64, experts__first_block=2)
    model = OnNumbers(backbone=str(tiny_bert), rank=1, overrides=options, device="cpu", random_state=0)
    getattr(estimator_checks, name)("OnNumbers", model)


@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_skips_what_it_cannot_feed_with_texts_and_passes_the_rest():
    done = estimator_checks.check_estimator(SparseFTClassifier(), on_fail=None, on_skip=None)
    assert done
    assert {entry["status"] for entry in done} == {"passed"}


def test_two_threads_fit_the_same_model(make):
    """Dropout draws from the one generator of torch, so that threads would disturb each other."""
    options = settings(train__epochs=1, experts__first_block=2, train__head_dropout=0.2)

    def fit(_):
        return make(overrides=options).fit(TEXTS[:40], MOODS[:40]).predict_proba(TEST_TEXTS[:8])

    with ThreadPoolExecutor(2) as pool:
        left, right = pool.map(fit, range(2))
    np.testing.assert_array_equal(left, right)
