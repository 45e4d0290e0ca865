import ast
import functools
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparse_ft

ROOT = Path(sparse_ft.__file__).parent
FILES = {
    ".".join(("sparse_ft", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
HEAVY = ("torch", "transformers", "sklearn", "datasets")

# The first layers, in the order of design.md; what stands here may import what stands before it, and its own layer.
FIRST_LAYERS = [("errors", "resources"), ("folders",), ("config", "tasks", "schemes", "words", "manifest")]


@functools.cache
def imports_of(module, *, top_level=False):
    """Name the modules that a module imports at run time, also inside functions unless ``top_level``."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(inner & FILES.keys() or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return frozenset(found)


def own_imports(module):
    return {name for name in imports_of(module) if name in FILES}


def reachable(module, *, top_level):
    """All modules that importing one brings in, foreign ones by their first name."""
    seen, waiting = set(), [module]
    while waiting:
        for name in imports_of(waiting.pop(), top_level=top_level):
            if name in FILES and name not in seen:
                waiting.append(name)
            seen.add(name if name in FILES else name.partition(".")[0])
    return seen


def test_imports_run_one_way():
    order = list(TopologicalSorter({module: own_imports(module) for module in FILES}).static_order())  # or CycleError
    assert set(order) == set(FILES)
    assert len(FILES) > 20


def test_the_first_layers_import_only_what_stands_before_them():
    allowed = {"sparse_ft"}  # the version
    for layer in FIRST_LAYERS:
        allowed |= {f"sparse_ft.{name}" for name in layer}
        for name in layer:
            assert own_imports(f"sparse_ft.{name}") <= allowed, name


def test_nobody_imports_the_command_line():
    assert not [module for module in FILES if "sparse_ft.cli.main" in imports_of(module)]


@pytest.mark.parametrize("module", ["tasks", "config", "schemes", "words", "manifest", "readers", "errors", "listing"])
def test_what_describes_data_knows_nothing_of_tensors(module):
    assert not reachable(f"sparse_ft.{module}", top_level=False) & {"torch", "transformers", "peft", "safetensors"}


def test_only_the_backbone_reaches_into_transformers_and_only_resources_knows_where_files_lie():
    def importers(name):
        return {module for module in FILES if any(found.partition(".")[0] == name for found in imports_of(module))}

    # pipeline.py registers with transformers' own pipelines, which is all that it is for; the exports build classifiers
    # of transformers and load what they wrote, as its users would.
    border = {"sparse_ft.integrations.transformers_pipeline", "sparse_ft.integrations.exporters.parts"}
    assert importers("transformers") == {"sparse_ft.backbone.backbone", "sparse_ft.checkpoint.checkpoint", *border}
    assert importers("spacy") == {"sparse_ft.integrations.spacy_component"}
    assert (
        FILES["sparse_ft.checkpoint.checkpoint"].read_text("utf-8").count("transformers.") == 1
    )  # its version, to write it down
    users = {
        module
        for module, path in FILES.items()
        if any(getattr(node, "id", None) == "__file__" for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    }
    assert users == {"sparse_ft.resources"}


@pytest.mark.parametrize("module", ["sparse_ft", "sparse_ft.cli.main", "sparse_ft.tasks.spec"])
def test_importing_in_a_fresh_process_loads_nothing_heavy(module):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert module in loaded
    assert not loaded & {*HEAVY, "numpy", "peft", "accelerate", "pyarrow", "matplotlib", "spacy"}
    assert not reachable(module, top_level=True) & set(HEAVY)


def test_nobody_imports_what_fits_us_into_other_libraries():
    """Their modules load whole libraries; whoever needs one imports it."""
    adapters = {
        "sparse_ft.integrations.transformers_pipeline",
        "sparse_ft.integrations.sklearn_estimator",
        "sparse_ft.integrations.spacy_component",
    }
    assert not [module for module in FILES if imports_of(module) & adapters]


def test_public_names_are_listed_and_come_from_their_modules():
    for name in sparse_ft.__all__:
        assert getattr(sparse_ft, name) is not None
    assert dir(sparse_ft) == sorted(sparse_ft.__all__)
    with pytest.raises(AttributeError, match="module 'sparse_ft' has no attribute 'tarin'"):
        _ = sparse_ft.tarin
