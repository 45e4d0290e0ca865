"""Run configs out of defaults, files, overrides and options."""

import pytest
import yaml

from sparse_ft.config import DataConfig, ExpertConfig, RunConfig, TrainConfig, load_config
from sparse_ft.errors import ConfigError
from sparse_ft.resources import bundled_dir, bundled_names


@pytest.fixture
def file(tmp_path):
    def write(content, name="run.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def message(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_without_anything_the_defaults_hold():
    config = load_config()
    assert config == RunConfig()
    assert (config.backbone, config.tasks, config.train) == ("minilm", [], TrainConfig())


def test_a_file_lists_differences_only(file):
    config = load_config(file({"train": {"epochs": 2}, "seed": 7}))
    assert (config.train.epochs, config.seed) == (2, 7)
    assert config.train == TrainConfig(epochs=2)
    assert config.experts == ExpertConfig()
    assert config.data == DataConfig()


def test_options_win_over_overrides_and_these_over_the_file(file):
    path = file({"seed": 1, "train": {"epochs": 1, "batch_size": 3}, "backbone": "a"})
    config = load_config(path, overrides=["seed=2", "train.epochs=2", "train.epochs=4"], values={"seed": 3})
    assert (config.seed, config.train.epochs, config.train.batch_size, config.backbone) == (3, 4, 3, "a")


@pytest.mark.parametrize(("override", "section", "key", "value"), [
    ("train.learning_rate=1e-3", "train", "learning_rate", 0.001),
    ("train.learning_rate=0.5", "train", "learning_rate", 0.5),
    ("train.precision=bf16", "train", "precision", "bf16"),
    ("train.head_learning_rate=null", "train", "head_learning_rate", None),
    ("experts.targets=[query, value]", "experts", "targets", ["query", "value"]),
    (" data.max_length = 64", "data", "max_length", 64),
])  # fmt: skip
def test_values_of_overrides_are_yaml(override, section, key, value):
    assert getattr(getattr(load_config(overrides=[override]), section), key) == value


def test_a_value_may_hold_an_equals_sign():
    assert load_config(overrides=["backbone=a=b"]).backbone == "a=b"


def test_a_config_survives_the_way_through_a_file(file):
    config = load_config(overrides=["train.epochs=3", "experts.targets=[query]", "sources={a: b}", "tasks=[ner]"])
    assert load_config(file(config.model_dump())) == config


def test_a_config_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        load_config().train.epochs = 3


@pytest.mark.parametrize(("override", "said"), [
    ("train.epochz=3", "Unknown key 'train.epochz'. Did you mean 'train.epochs'?"),
    ("trian.epochs=3", "Unknown key 'trian'. Did you mean 'train'?"),
    ("train.epochs=many", "train.epochs: Input should be a valid integer"),
    ("train.epochs=0", "(got 0)"),
    ("train.precision=fp8", "train.precision: Input should be 'auto', 'fp32' or 'bf16' (got 'fp8')"),
    ("train.mixture=random", "'proportional', 'smoothed' or 'uniform'"),
    ("train.epochs", "--set 'train.epochs' is not of the form section.key=value, e.g. train.epochs=3"),
    ("=3", "is not of the form section.key=value"),
    ("train.epochs=[1", "--set 'train.epochs=[1': the value is not readable YAML: while parsing a flow sequence"),
    ("train=3", "train: "),
    ("seed.x=3", "seed: Input should be a valid integer"),
    ("experts.targets=query", "experts.targets: Input should be a valid list"),
    ("data.max_length=2", "greater than or equal to 8 (got 2)"),
    ("train.label_smoothing=1", "less than 1 (got 1)"),
])  # fmt: skip
def test_bad_overrides_are_refused(override, said):
    assert said in message(overrides=[override])


INTEGER, NUMBER = "train.batch_size: Input should be a valid integer", "train.learning_rate: Input should be a "


@pytest.mark.parametrize(("key", "text", "said"), [
    ("train.batch_size", "true", f"{INTEGER} (got True)."),
    ("train.batch_size", "'32'", "(got '32'). Write a number in digits, without quotes, _ or leading zeros."),
    *(("train.batch_size", text, f"{INTEGER} (got '{text}')") for text in ("010", "1_000", "1:30", "0x20", "on",
                                                                              "2024-01-31", ".inf")),
    ("train.batch_size", "32.0", f"{INTEGER} (got 32.0)."),
    ("train.batch_size", "1e2", f"{INTEGER} (got 100.0)."),
    ("train.learning_rate", "true", f"{NUMBER}valid number (got True)."),
    *(("train.learning_rate", text, f"{NUMBER}valid number (got '{text}')") for text in (".inf", ".nan", "1e999", "inf",
                                                                                          "1:30.5", "0.1.2")),
    ("gate.capacity", "1:30", "gate.capacity: Input should be a valid number (got '1:30')"),
    ("experts.shared", "1", "experts.shared: Input should be a valid boolean (got 1)."),
    ("experts.shared", "y", "experts.shared: Input should be a valid boolean (got 'y')."),
    ("experts.targets", "[true]", "experts.targets.0: Input should be a valid string (got True). Put it in quotes."),
    ("sources", "{a: 1}", "sources.a: Input should be a valid string (got 1). Put it in quotes."),
    ("seed", "9223372036854775808", "seed: Input should be less than or equal to 9223372036854775807"),
])  # fmt: skip
def test_types_are_strict_in_files_and_overrides(file, key, text, said):
    section, _, name = key.rpartition(".")
    assert said in message(overrides=[f"{key}={text}"])
    assert said in message(file(f"{section}: {{{name}: {text}}}" if section else f"{name}: {text}"))


@pytest.mark.parametrize(("value", "said"), [
    ({"train": {"batch_size": True}}, f"{INTEGER} (got True)."),
    ({"train": {"learning_rate": float("inf")}}, f"{NUMBER}finite number (got inf)."),
    ({"gate": {"capacity": float("nan")}}, "gate.capacity: Input should be a finite number (got nan)."),
    ({"seed": "7"}, "seed: Input should be a valid integer (got '7')."),
    ({"gate": {"min_confidence": "x"}}, "gate.min_confidence: Input should be a valid number (got 'x')."),
    ({"experts": {"alpha": 1e300}}, "experts.alpha: Input should be less than or equal to 1000000 (got 1e+300)."),
    ({"gate": {"temperature": 1e-300}}, "gate.temperature: Input should be greater than or equal to"),
    ({"train": {"workers": 10**6}}, "train.workers: Input should be less than or equal to 1024 (got 1000000)."),
    ({"backbone": 7}, "backbone: Input should be a valid string (got 7). Put it in quotes."),
])  # fmt: skip
def test_types_are_strict_in_python(value, said):
    assert said in message(values=value)


def test_text_of_digits_and_words_for_booleans_are_read(file):
    config = load_config(overrides=["revision=1234567", "output=010", "backbone=true", "revision=12e45", "start=null"])
    assert (config.revision, config.output, config.backbone, config.start) == ("12e45", "010", "true", None)
    for word, value in {"yes": True, "on": True, "True": True, "no": False, "off": False, "false": False}.items():
        assert load_config(file(f"experts: {{shared: {word}}}")).experts.shared is value
    config = load_config(values={"experts": {"targets": ("query",)}, "train": {"learning_rate": 1}})
    assert (config.experts.targets, config.train.learning_rate) == (["query"], 1.0)


def test_an_override_into_a_value_is_refused(file):
    assert "'seed' is a value, not a section" in message(file({"seed": 1}), overrides=["seed.x=3"])


def test_all_problems_are_told_at_once(file):
    text = message(file({"train": {"epochs": "x", "clipp": 1}, "sed": 1}))
    for said in ("train.epochs: ", "Did you mean 'train.clip'?", "Did you mean 'seed'?"):
        assert said in text


def test_unreadable_files_are_named(file, tmp_path):
    assert f"Config file {str(tmp_path / 'no.yaml')!r} cannot be read: No such file" in message(tmp_path / "no.yaml")
    assert "is not readable YAML" in message(file("a: ["))
    assert "must hold a mapping of keys, not list" in message(file("- a"))
    assert "must hold a mapping of keys, not NoneType" in message(file(""))
    (tmp_path / "latin.yaml").write_bytes(b"backbone: caf\xe9")
    assert "is not UTF-8: byte 13 is 0xe9" in message(tmp_path / "latin.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read: Is a directory" in message(tmp_path / "folder.yaml")


def test_an_unknown_bundled_config_is_refused():
    text = message("no-such-config")
    assert "Unknown config 'no-such-config'" in text
    assert "Or give the path of a YAML file" in text
    for name in bundled_names("configs"):
        assert name in text


def test_there_are_bundled_configs():
    assert bundled_names("configs")


@pytest.mark.parametrize("name", bundled_names("configs"))
def test_a_bundled_config_holds_differences_only(name):
    values = yaml.safe_load((bundled_dir("configs") / f"{name}.yaml").read_text(encoding="utf-8"))
    assert load_config(name) != RunConfig()
    defaults = RunConfig().model_dump()
    for section, content in values.items():
        for key, value in content.items() if isinstance(content, dict) else [(None, content)]:
            assert value != (defaults[section] if key is None else defaults[section][key]), (section, key)
