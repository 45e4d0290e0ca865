from pathlib import Path

import pytest

from sparse_ft.errors import ConfigError
from sparse_ft.paths import output_path, user_path


def test_the_home_folder_is_filled_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs/ner") == tmp_path / "runs/ner"
    assert user_path("runs/~ner") == Path("runs/~ner")


@pytest.mark.parametrize(("path", "message"), [
    ("~no-such-user/x", "'~no-such-user/x' begins with '~no-such-user', and there is no such user"),
    ("a\0b", "holds a NUL character"),
    ("x/caf\udce9", r"'x/caf\\udce9' is not UTF-8"),
    (f"x/{'中' * 86}/y", "has a name of 258 bytes; a name has at most 255"),
])  # fmt: skip
def test_what_can_be_no_path_is_refused_with_its_reason(path, message):
    with pytest.raises(ConfigError, match=message):
        user_path(path)


def test_an_output_has_its_links_resolved(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far")
    assert output_path(tmp_path / "link/new", room=0) == tmp_path / "far/new"


@pytest.mark.parametrize(("path", "message"), [
    ("loop", "'.*loop' cannot be written: Too many levels of symbolic links"),
    ("loop/in/it", "Too many levels of symbolic links"),
    ("file/in/it", "file is a file, not a folder"),
    ("a" * 242, "has a name of 242 bytes; what is written has at most 241"),
    ("/".join(["b" * 200] * 20), r"is a path of 4\d\d\d bytes; what is written has at most 3800"),
])  # fmt: skip
def test_what_can_be_no_output_is_refused_before_it_is_needed(tmp_path, path, message):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message):
        output_path(f"{tmp_path}/{path}", room=14)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "loop"]
