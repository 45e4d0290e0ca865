"""The order of the rooms: a file may import its own room and the rooms that stand above it in this list."""

import ast
import functools
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparse_ft

ROOMS = (
    {"errors", "resources", "sections", "version", "yaml_schema"},
    {"documents", "json_output", "paths", "progress"},
    {"config", "backbone"},
    {"tasks", "experts"},  # side by side: neither knows the other
    {"checkpoint"},
    {"prediction"},
    {"evaluation"},
    {"training"},
    {"merging", "integrations", "serving"},
    {"cli"},
)

ROOT = Path(sparse_ft.__file__).parent
FILES = {
    ".".join(("sparse_ft", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path.parent.name != "templates"  # the code of exports
}
HEAVY = {
    "torch",
    "transformers",
    "sklearn",
    "datasets",
    "numpy",
    "peft",
    "accelerate",
    "pyarrow",
    "matplotlib",
    "spacy",
}


@functools.cache
def imports_of(module, *, top_level=False):
    """Name the modules that a module imports at run time, also inside functions unless ``top_level``."""
    imported = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            imported.update(inner & FILES.keys() or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(FILES[module].read_text(encoding="utf-8")))
    return frozenset(imported)


def own_imports(module):
    return {name for name in imports_of(module) if name in FILES}


def room(module):
    return module.split(".")[1]


def reachable(module):
    """Return all modules that importing one brings in, foreign ones by their first name."""
    seen, waiting = set(), [module]
    while waiting:
        for name in imports_of(waiting.pop(), top_level=True):
            if name in FILES and name not in seen:
                waiting.append(name)
            seen.add(name if name in FILES else name.partition(".")[0])
    return seen


def test_imports_run_one_way_between_the_rooms():
    faces = {"sparse_ft", "sparse_ft.pipeline"}  # they only hand names on
    floor = {name: number for number, names in enumerate(ROOMS) for name in names}
    upward = {
        f"{module} imports {name}"
        for module in FILES.keys() - faces
        for name in own_imports(module)
        if name in faces or (room(name) != room(module) and floor[room(name)] >= floor[room(module)])
    }
    assert not upward


def test_no_files_import_each_other_in_a_circle():
    order = list(TopologicalSorter({module: own_imports(module) for module in FILES}).static_order())  # or CycleError
    assert set(order) == set(FILES)
    assert len(FILES) > 20


def test_a_library_is_imported_by_the_few_files_that_are_for_it():
    def importers(library):
        return {module for module in FILES if any(name.partition(".")[0] == library for name in imports_of(module))}

    assert importers("transformers") == {
        "sparse_ft.backbone.backbone",
        "sparse_ft.checkpoint.checkpoint",  # its version, to write it down
        "sparse_ft.integrations.exporters.parts",  # builds classifiers of transformers
        "sparse_ft.integrations.transformers_pipeline",
    }
    assert importers("spacy") == {"sparse_ft.integrations.spacy_component"}
    locating = {module for module, path in FILES.items() if "__file__" in path.read_text("utf-8")}
    assert locating == {"sparse_ft.resources"}


@pytest.mark.parametrize("module", ["sparse_ft", "sparse_ft.cli.main", "sparse_ft.tasks.spec", "sparse_ft.cli.listing"])
def test_importing_in_a_fresh_process_loads_nothing_heavy(module):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert module in loaded
    assert not loaded & HEAVY
    assert not reachable(module) & HEAVY


def test_the_rows_of_a_training_run_are_prepared_without_prediction():
    rooms = {room(module) for module in reachable("sparse_ft.training.training_task") & FILES.keys()}
    assert not rooms & {"prediction", "evaluation"}


def test_nobody_imports_the_adapters_to_other_libraries():
    """Each loads a whole library; a user who needs one imports it."""
    adapters = {f"sparse_ft.integrations.{name}" for name in ("transformers_pipeline", "sklearn_estimator")}
    adapters |= {"sparse_ft.integrations.spacy_component", "sparse_ft.pipeline"}
    assert {module for module in FILES if imports_of(module) & adapters} == {"sparse_ft.pipeline"}


def test_public_names_are_listed_and_come_from_their_modules():
    for name in sparse_ft.__all__:
        assert getattr(sparse_ft, name) is not None
    assert dir(sparse_ft) == sorted(sparse_ft.__all__)
    with pytest.raises(AttributeError, match="module 'sparse_ft' has no attribute 'tarin'"):
        _ = sparse_ft.tarin
