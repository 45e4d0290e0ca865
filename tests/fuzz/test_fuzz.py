"""Damaged files of every kind: no traceback, no half-written output, no answer of a damaged checkpoint."""

import json

import pytest

from fuzz.fuzzer import run_case, undamaged_answers
from fuzz.subjects import write_inputs

CASES, PARTS = 300, 6


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """The inputs, the backbone, and the answers of the undamaged checkpoint."""
    inputs, bert = write_inputs(tmp_path_factory.mktemp("fuzz"))
    return inputs, bert, undamaged_answers(inputs, bert=bert)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_file_is_used_or_refused_in_one_sentence(undamaged, part):
    inputs, bert, answers = undamaged
    cases = [run_case(f"ci/{number}", inputs, bert=bert, answers=answers) for number in range(part, CASES, PARTS)]
    assert [json.dumps([case.seed, case.damage, case.faults, case.error[-300:]]) for case in cases if case.faults] == []
    assert {case.code for case in cases} == {0, 2}
