"""YAML, JSON and encodings of foreign files: what they mean, and what is refused before it costs anything."""

import time

import pytest
import yaml

from sparse_ft.documents import decode, parse_json, parse_yaml, read_json, read_json_object, read_yaml
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.yaml_schema import MAX_DEPTH, yaml_text

REPEATED = "".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9))
MERGED = "".join(f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}\n" for level in range(1, 9))


@pytest.mark.parametrize(("text", "value", "written"), [
    ("yes", "yes", "yes"),
    ("No", "No", "No"),
    ("on", "on", "on"),
    ("true", True, "true"),
    ("False", False, "False"),
    ("12", 12, 12),
    ("-3", -3, -3),
    ("0", 0, 0),
    ("01", "01", "01"),
    ("+1", "+1", "+1"),
    ("0x1f", "0x1f", "0x1f"),
    ("1_000", "1_000", "1_000"),
    ("1:30", "1:30", "1:30"),
    ("2024-01-01", "2024-01-01", "2024-01-01"),
    ("1.10", 1.1, "1.10"),
    ("1e-3", 0.001, "1e-3"),
    ("1e999", "1e999", "1e999"),
    (".inf", ".inf", ".inf"),
    (".nan", ".nan", ".nan"),
    ("null", None, None),
    ("~", None, None),
    ("", None, None),
    ("'01'", "01", "01"),
    ("!!str 1", "1", "1"),
    ("[a, {b: 1}]", ["a", {"b": 1}], ["a", {"b": 1}]),
    ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", *[{"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}] * 2),
])  # fmt: skip
def test_yaml_is_read_by_version_1_2(text, value, written):
    assert repr(parse_yaml(text, "x")) == repr(value)  # repr tells 1 from True
    assert repr(parse_yaml(text, "x", written=True)) == repr(written)


def test_what_is_written_is_read_again():
    words = ["1e3", "1.5e3", "-.5", "12E4", "yes", "on", "null", "~", "", "01", "1:30", "1_0", "2024-01-01", "0x1f",
             "true", ".inf", "=", "<<", "a: b", "- a", "#", "你好", "line\nbreak"]  # fmt: skip
    content = {"words": words, "by": {word: word for word in words}, "numbers": [1, 1.5, 1e-5, 1e300, True, None]}
    text = yaml_text(content)
    assert parse_yaml(text, "x") == yaml.safe_load(text) == content
    assert parse_yaml(text, "x", written=True)["by"] == content["by"]


@pytest.mark.parametrize(("text", "reason"), [
    ("[" * 5000, f"more than {MAX_DEPTH} lists and mappings inside each other"),
    ("- " * 5000, f"more than {MAX_DEPTH} lists"),
    ("{a: " * 101 + "1" + "}" * 101, f"more than {MAX_DEPTH} lists"),
    ("a0: &a0 [x, x]\n" + REPEATED, "aliases repeat more than 10000 values in line 5"),
    ("a0: &a0 {k: x}\n" + MERGED, "aliases repeat more than 10000 values in line 5"),
    ("&a [*a]", "an alias stands inside the value that it repeats in line 1, column 5"),
    ("a: 1\nb: 2\na: 3", "the key 'a' stands twice in one mapping in line 3, column 1"),
    ("!!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
    ("!!binary aGk=", "could not determine a constructor"),
    ("!!bool maybe", "'maybe' is no boolean"),
    ("!!int '1:30'", "'1:30'"),
    ("a\0b", "special characters are not allowed"),
    ('"\\ud800"', "half of a character"),
    ("--- a\n--- b", "expected a single document"),
    ("? [a]\n: b", "found unhashable key"),
])  # fmt: skip
def test_yaml_that_is_refused(text, reason):
    start = time.process_time()
    with pytest.raises(DataError, match=f"^Rules is not readable YAML: .*{reason}") as caught:
        parse_yaml(text, "Rules", error=DataError)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(("text", "value"), [
    ('{"a": [1, 2.5, null, true]}', {"a": [1, 2.5, None, True]}),
    ('"\\ud83d\\ude00"', "😀"),
    ("[" * MAX_DEPTH + "]" * MAX_DEPTH, None),
])  # fmt: skip
def test_json(text, value):
    assert value in (parse_json(text, "x"), None)


def test_fractions_of_json_can_keep_their_text():
    value = parse_json("[1.10, 1e3, 7]", "x", written=True)
    assert value == [1.1, 1000.0, 7]
    assert list(map(str, value)) == ["1.10", "1e3", "7"]


@pytest.mark.parametrize(("text", "reason"), [
    ("[" * 5000, f"more than {MAX_DEPTH} lists and mappings inside each other"),
    ('{"a": ' * 101 + "1" + "}" * 101, f"more than {MAX_DEPTH} lists"),
    ('{"a": NaN}', "NaN is no JSON value"),
    ("[-Infinity]", "-Infinity is no JSON value"),
    ("1e999", "the number 1e999 is too large"),
    ("1" * 5000, "Exceeds the limit"),
    ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice in one object"),
    ('"\\ud800"', "half of a character"),
    ("", "Expecting value at column 1"),
    ('{"a": 1,\n}', "Expecting property name enclosed in double quotes at line 2 column 1"),
    ("1 2", "Extra data at column 3"),
])  # fmt: skip
def test_json_that_is_refused(text, reason):
    with pytest.raises(DataError, match=f"^Line 3 is not readable JSON: .*{reason}"):
        parse_json(text, "Line 3", error=DataError)


@pytest.mark.parametrize(("content", "reason"), [
    ("text,label".encode("utf-16"), "is UTF-16, not UTF-8: it begins with the byte-order mark ff fe. "
     "Convert the file to UTF-8, e.g. `iconv -f UTF-16 -t UTF-8 OLD > NEW`"),
    ("text,label".encode("utf-16-le"), "is UTF-16LE, not UTF-8"),
    ("text,label".encode("utf-16-be"), "is UTF-16BE, not UTF-8"),
    ("Über naïve Tests".encode("utf-16-le"), "byte 0 is 0xdc. Convert the file to UTF-8, e.g. `iconv -f UTF-16LE"),
    ("这个 room 很好".encode("utf-16-be"), "e.g. `iconv -f UTF-16BE"),
    ("text".encode("utf-32"), "is UTF-32, not UTF-8"),
    ("un café très bon".encode("latin-1"), "byte 6 is 0xe9. Convert the file to UTF-8, e.g. `iconv -f WINDOWS-1252"),
    ("这个房间很好".encode("gb18030"), "byte 0 is 0xd5. Convert the file to UTF-8, e.g. `iconv -f GB18030"),
    ("Привет мир".encode("cp1251"), "with the encoding that it was saved in"),
])  # fmt: skip
def test_another_encoding_is_named(content, reason):
    with pytest.raises(ConfigError) as caught:
        decode(content, "It")
    assert reason in str(caught.value)


def test_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf[1, 2]")
    assert read_yaml(file) == read_json(file) == [1, 2]
    with pytest.raises(ConfigError, match=r"a\.txt' must hold an object with keys, not list"):
        read_json_object(file)
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "no", "No such file"), (tmp_path / "\0", "null")):
        with pytest.raises(DataError, match=f"cannot be read: .*{reason}"):
            read_yaml(path, error=DataError)
