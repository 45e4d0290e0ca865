"""Streams that cannot be used end a command with 2 and a reason before it does anything."""

import io
import sys
from pathlib import Path

import pytest
from toys import call, quick, write_toy

from sparse_ft.cli.streams import StreamError, check_streams, unprintable


def opened(path, mode):
    return Path(path).open(mode)  # stands in for standard output


def latin():
    return io.TextIOWrapper(io.BytesIO(), encoding="latin-1")


@pytest.mark.parametrize(("stdout", "arguments", "message"), [
    (lambda: None, ["tasks"], "Error: Standard output is closed, so nothing can be printed."),
    (lambda: opened("/dev/full", "w"), ["tasks"], "Error: Standard output cannot be written: No space left on"),
    (lambda: opened("/dev/null", "r"), ["tasks"], "Error: Standard output cannot be written: Bad file descriptor."),
    (latin, ["predict", "nowhere", "我们"], "Error: Standard output is encoded in latin-1, which lacks '我'. Set PYTH"),
    (latin, ["train", "--task", "intent"], "encoded in latin-1, in which the report of a run may have labels that"),
    (io.StringIO, ["tasks", "caf\udce9"], r"Error: The argument 'caf\udce9' is not UTF-8."),
])  # fmt: skip
def test_an_output_that_takes_nothing_ends_a_command_before_its_work(
    tmp_path, monkeypatch, capsys, stdout, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stream = stdout()
        patch.setattr(sys, "stdout", stream)
        code, _, err = call(monkeypatch, capsys, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_latin_answers_are_printed_in_latin(monkeypatch, capsys):
    stream = latin()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert call(monkeypatch, capsys, "tasks", "intent")[0] == 0
    assert stream.buffer.getvalue().decode("latin-1").startswith("intent: ")


def test_texts_are_not_read_from_a_closed_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    for arguments in (["nowhere"], ["nowhere", "--file", "-"]):
        code, _, err = call(monkeypatch, capsys, "predict", *arguments)
        assert (code, err) == (2, "Error: Standard input is closed. Give texts as arguments, or --file FILE.\n")
    assert "does not exist" in call(monkeypatch, capsys, "predict", "nowhere", "a text")[2]  # needs no input


@pytest.mark.parametrize("output", ["loop", "~no-such-user/x", "n" * 246, f"{'n' * 300}/x", "file/x"])
def test_an_output_that_cannot_be_is_refused_before_training(tmp_path, monkeypatch, capsys, output):
    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(monkeypatch, capsys, "train", "--task", task, "--output", output, *quick())
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert repr(output[:40])[:-1] in err
    assert sorted(tmp_path.rglob("*")) == before


def test_half_a_character_is_no_fault_of_the_encoding():
    with pytest.raises(UnicodeEncodeError) as caught:
        "\ud800".encode()
    assert unprintable(caught.value).startswith(r"A text holds '\ud800', half of a character")


def test_streams_that_are_no_files_pass(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    check_streams(["predict", "我们"])
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(StreamError, match="closed"):
        check_streams([])
