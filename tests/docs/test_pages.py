"""Generated parts are those that the code gives today, links lead somewhere, and pages agree with the packaging."""

import hashlib
import importlib.util
import re
import tomllib

import pytest
import yaml
from snippets import ROOT

import sparse_ft

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_generated_parts_are_current():
    location = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(location)
    location.loader.exec_module(generate)
    pages = generate.pages()
    assert len(pages) >= 7
    stale = [page.name for page, text in pages.items() if page.read_text(encoding="utf-8") != text]
    assert not stale, "run python docs/generate.py"


def anchors(page):
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"])
def test_links_outside_the_site_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        assert not anchor or anchor in anchors(page.parent / path), target


def test_readme_is_short_and_says_what_the_packaging_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer" in readme
    (torch,) = [need for need in PROJECT["dependencies"] if need.startswith("torch")]
    quickstart = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    assert f"`{torch}`" in quickstart
    assert f'"torch{torch.partition(",")[2]}" --index-url' in readme
    assert {f"`{extra}`" for extra in PROJECT["optional-dependencies"]} <= set(re.findall(r"`\w+`", quickstart))


def test_the_architecture_page_names_files_that_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/.-]+(?:\.py|/))`", text))
    assert len(named) > 50
    lacking = {path for path in named if not (ROOT / path).exists() and not (ROOT / "sparse_ft" / path).exists()}
    assert not lacking


def test_the_version_has_a_dated_entry_and_the_license_is_whole():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == sparse_ft.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    dated = rf"^## \[{re.escape(sparse_ft.__version__)}\] - \d{{4}}-\d\d-\d\d$"
    assert re.search(dated, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    published = (
        "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # apache.org/licenses/LICENSE-2.0.txt
    )
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == published
