import pytest

import sparse_ft
from sparse_ft import errors
from sparse_ft.errors import BackboneError, CheckpointError, ConfigError, DataError, SparseFTError, unknown_name


@pytest.mark.parametrize("kind", [ConfigError, DataError, BackboneError, CheckpointError])
def test_what_a_user_can_mend_has_one_base(kind):
    assert issubclass(kind, SparseFTError)
    assert not issubclass(SparseFTError, (ValueError, OSError, RuntimeError))
    assert sparse_ft.SparseFTError is errors.SparseFTError


def test_the_message_names_the_value_the_closest_name_and_all_others():
    message = unknown_name("task", "sentimant", ["topic", "sentiment", "ner"])
    assert message == "Unknown task 'sentimant'. Did you mean 'sentiment'? Known: topic, sentiment, ner."


def test_a_name_that_is_close_to_none_gets_no_suggestion():
    assert unknown_name("task", "zzz", ["topic", "ner"]) == "Unknown task 'zzz'. Known: topic, ner."


def test_an_empty_table_says_so():
    assert unknown_name("expert", "ner", []) == "Unknown expert 'ner'. Known: none."
    assert unknown_name("expert", "ner", iter([])) == "Unknown expert 'ner'. Known: none."


def test_a_long_table_is_cut_and_counted_but_still_searched():
    names = [f"task-{number:03}" for number in range(150)]
    message = unknown_name("task", "task-1499", names)
    assert "Did you mean 'task-149'?" in message
    assert message.endswith("task-039, … (150 in all).")
    assert "task-040" not in message


def test_names_that_are_no_text_are_listed_too():
    assert unknown_name("column", "3", [1, 2, "text"]) == "Unknown column '3'. Known: 1, 2, text."
