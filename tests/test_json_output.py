"""JSON that leaves the program holds finite numbers only."""

import math

import pytest

from sparse_ft.errors import SparseFTError
from sparse_ft.json_output import json_text, null_if_undefined


@pytest.mark.parametrize(("content", "key"), [
    ({"tasks": {"mood": {"label": "good", "score": math.nan}}}, "tasks.mood.score is nan"),
    ({"routing": [1.0, math.inf]}, "routing.1 is inf"),
    (-math.inf, "The value is -inf"),
])  # fmt: skip
def test_a_number_that_is_not_finite_is_named(content, key):
    with pytest.raises(SparseFTError, match=key):
        json_text(content)


def test_everything_else_is_json():
    assert json_text({"text": "Zürich", "scores": [0.5, None]}) == '{"text": "Zürich", "scores": [0.5, null]}'
    assert json_text([1], indent=2) == "[\n  1\n]"
    assert null_if_undefined({"accuracy": 0.5, "correlation": math.nan}) == {"accuracy": 0.5, "correlation": None}
