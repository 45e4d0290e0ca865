"""The types and ranges of the settings of a merge."""

import math

import pytest

from sparse_ft.errors import ConfigError
from sparse_ft.merging.settings import merge_settings


@pytest.mark.parametrize(("setting", "said"), [
    ({"density": True}, "density: Input should be a valid number (got True)."),
    ({"density": math.nan}, "density: Input should be a finite number (got nan)."),
    ({"density": "0.5"}, "density: Input should be a valid number (got '0.5')."),
    ({"rank": True}, "rank: Input should be a valid integer (got True)."),
    ({"rank": 4.0}, "rank: Input should be a valid integer (got 4.0)."),
    ({"weights": [1, True]}, "weights.1: Input should be a valid number (got True)."),
    ({"weights": [1, math.inf]}, "weights.1: Input should be a finite number (got inf)."),
    ({"weights": ["1", 1]}, "weights.0: Input should be a valid number (got '1')."),
    ({"seed": -1}, "seed: Input should be greater than or equal to 0 (got -1)."),
    ({"seed": 2**32}, "seed: Input should be less than 4294967296"),
    ({"evaluate": "no"}, "evaluate: Input should be a valid boolean (got 'no')."),
    ({"evaluate": 1}, "evaluate: Input should be a valid boolean (got 1)."),
])  # fmt: skip
def test_types_are_strict(setting, said):
    with pytest.raises(ConfigError) as caught:
        merge_settings({"method": "dare_ties", **setting})
    assert said in str(caught.value)


def test_lists_and_whole_numbers_are_weights():
    assert merge_settings({"method": "linear", "weights": [1, 0.5]}).weights == (1.0, 0.5)
