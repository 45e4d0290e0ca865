"""Fill the generated parts of the documentation from the code.

    python docs/generate.py            write them
    python docs/generate.py --check    only say which pages are not current; exit code 1 if any

A generated part stands between ``<!-- begin generated: NAME -->`` and ``<!-- end generated -->``.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import typer
import yaml
from pydantic import BaseModel

from sparse_ft import config
from sparse_ft.backbone.backbone import FAMILIES
from sparse_ft.cli.main import app
from sparse_ft.merging.methods import MERGE_METHODS
from sparse_ft.prediction.rules import Rule
from sparse_ft.tasks import spec
from sparse_ft.tasks.spec import list_tasks, load_task

DOCS = Path(__file__).parent
_PART = re.compile(r"(<!-- begin generated: ([\w-]+) -->\n).*?(<!-- end generated -->)", re.DOTALL)
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def commands() -> str:
    """List the arguments and options of every command."""
    parts = []
    for command in app.registered_commands:
        function = command.callback
        assert function is not None
        parameters = [_parameter(*item) for item in inspect.signature(function, eval_str=True).parameters.items()]
        arguments = [parameter for parameter in parameters if not parameter.option]
        options = [parameter for parameter in parameters if parameter.option]
        name = command.name or function.__name__
        usage = " ".join(["sparse-ft", name, *(p.shown for p in arguments), *(["[OPTIONS]"] if options else [])])
        description = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(function.__doc__ or ""))
        rows = [(p.cell, p.help) for p in (*arguments, *options)]
        parts.append(f"## {name}\n\n{description}\n\n```text\n{usage}\n```\n\n{table(('', 'meaning'), rows)}")
    return "\n".join(parts)


class Parameter(NamedTuple):
    """An argument or option of a command."""

    shown: str
    """As it is typed."""
    help: str
    option: bool
    required: bool

    @property
    def cell(self) -> str:
        """The first cell of its row."""
        must = " (required)" if self.option and self.required else ""
        return code(self.shown) + must


def _parameter(name: str, parameter: inspect.Parameter) -> Parameter:
    annotation, info = get_args(parameter.annotation)
    required = parameter.default is inspect.Parameter.empty
    several = "list[" in str(annotation)
    if isinstance(info, typer.models.ArgumentInfo):
        shown = info.metavar or name.upper() + (" ..." if several else "")
        return Parameter(shown if required else f"[{shown}]", info.help or "", option=False, required=required)
    named = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str) and word[:2] == "--"]
    option = next(iter(named), f"--{name.replace('_', '-')}")
    choices = [choice for part in get_args(annotation) for choice in get_args(part) if isinstance(choice, str)]
    value = "" if annotation is bool else f" {info.metavar or '|'.join(choices) or name.upper()}"
    return Parameter(option + value, info.help or "", option=True, required=required)


def settings() -> str:
    """List the settings of a run, section by section."""
    sections = {
        name: type(value) for name, value in config.RunConfig().__dict__.items() if isinstance(value, BaseModel)
    }
    parts = [f"## Top level\n\n{fields(config.RunConfig, leave_out=sections)}"]
    for name, section in sections.items():
        parts.append(f"## {name}\n\n{first_paragraph(section)}\n\n{fields(section, prefix=f'{name}.')}")
    return "\n".join(parts)


def task_keys() -> str:
    """List the keys of a task file."""
    parts = [fields(spec.TaskSpec)]
    for name, section in (("files", spec.FileSource), ("hub", spec.HubSource), ("division", spec.Division)):
        parts.append(f"### {name}\n\n{first_paragraph(section)}\n\n{fields(section, prefix=f'{name}.')}")
    return "\n".join(parts)


def rule_keys() -> str:
    """List the conditions of a rule."""
    return fields(Rule)


def bundled_tasks() -> str:
    """List the task files that come with the package."""
    rows = []
    for name in list_tasks():
        task = load_task(name)
        source = f"[source]({task.source})" if task.source.startswith("http") else task.source
        rows.append((f"`{name}`", task.kind, task.language, task.description, task.metric, task.license, source))
    return table(("task", "kind", "language", "question", "metric", "licence of the data", "source"), rows)


def merge_methods() -> str:
    """List the merge methods, what they heed, and their papers."""
    rows = []
    for name, method in MERGE_METHODS.items():
        words = inspect.cleandoc(method.function.__doc__ or "").split("\n\n")[0].split()
        special = {"cat": "Add up the deltas times their weights, exactly: the ranks add up.",
                   "svd": "Add up the deltas times their weights, and cut the sum to the rank."}  # fmt: skip
        heeds = ", ".join(f"`--{setting}`" for setting in method.heeds)
        rows.append((f"`{name}`", special.get(name, " ".join(words)), heeds, f"[source]({method.source})"))
    return table(("method", "what it does with the deltas of a layer", "options", ""), rows)


def backbone_families() -> str:
    """List the architectures that may be a backbone."""
    rows = []
    for name, family in FAMILIES.items():
        kind = "causal" if family.causal else "reads both ways"
        together = "yes" if family.routes_rows else "no: one expert at a time"
        rows.append((f"`{name}`", kind, together, "yes" if family.caches_trunk else "no"))
    return table(("`model_type`", "attention", "rows of several experts in one batch", "trunk computed once"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "settings": settings,
    "task-keys": task_keys,
    "rule-keys": rule_keys,
    "bundled-tasks": bundled_tasks,
    "merge-methods": merge_methods,
    "backbone-families": backbone_families,
}


def fields(model: type[BaseModel], *, prefix: str = "", leave_out: Iterable[str] = ()) -> str:
    """Make a table of the fields of a settings model: name, type, default and docstring."""
    explained = docstrings(model)
    rows = []
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        annotation, text = explained[name]
        default = "required" if field.is_required() else f"`{plain(field.get_default(call_default_factory=True))}`"
        if (model, name) == (spec.TaskSpec, "metric"):  # filled in before the required fields are checked
            default = "by kind"
        limits = [
            f"{word} {plain(getattr(limit, attribute))}"
            for limit in field.metadata
            for attribute, word in _BOUNDS.items()
            if getattr(limit, attribute, None) is not None
        ]
        allowed = ", ".join([code(annotation), *limits])
        rows.append((f"`{prefix}{name}`", default, allowed, text))
    return table(("key", "default", "allowed", "meaning"), rows)


def docstrings(model: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Return the annotation and the docstring below each field, as they stand in the source."""
    (node,) = ast.parse(inspect.getsource(model)).body
    found: dict[str, tuple[str, str]] = {}
    name = ""
    for statement in node.body:  # type: ignore[attr-defined]
        if isinstance(statement, ast.AnnAssign):
            name = ast.unparse(statement.target)
            found[name] = (readable(ast.unparse(statement.annotation)), "")
        elif isinstance(statement, ast.Expr) and name:
            text = " ".join(ast.literal_eval(statement.value).split())
            found[name] = (found[name][0], text.replace("``", "`"))
            name = ""
        else:
            name = ""
    return found


def readable(annotation: str) -> str:
    """Write a type as the reader of a YAML file knows it."""
    while literal := re.search(r"Literal\[([^\[\]]*)\]", annotation):
        annotation = annotation.replace(literal[0], literal[1].replace("'", "").replace(", ", " | "))
    annotation = re.sub(r"Annotated\[(\w+\[[^\[\]]*\]), [^\]]*\]", r"\1", annotation)
    for name, meaning in (("Flag", "bool"), ("Texts", "list[str]"), ("Temperature", "float")):
        annotation = re.sub(rf"\b{name}\b", meaning, annotation)
    names = {"None": "null", "Column": "name or index", "Split": "train | validation | test", "Any": "value"}
    return re.sub(r"\b(None|Column|Split|Any)\b", lambda match: names[match[0]], annotation)


def plain(value: object) -> str:
    """Write a default as YAML does."""
    return yaml.safe_dump(value, default_flow_style=True).replace("...", "").strip() or "''"


def first_paragraph(described: object) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join(inspect.cleandoc(described.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")


def cell(text: str) -> str:
    """Write a text on one line; outside of code, angle brackets are no HTML."""
    parts = re.split(r"(`[^`]*`|</?code>)", " ".join(text.split()))
    return "".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def code(text: str) -> str:
    """Write a word as code in a cell of a table, whose cells are divided by bars."""
    return f"<code>{text.replace('<', '&lt;').replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows), ""])


def pages() -> dict[Path, str]:
    """Return every page that holds generated parts, with these made anew."""
    made: dict[Path, str] = {}
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        new = _PART.sub(lambda match: f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}", text)
        if _PART.search(text):
            made[path] = new
    return made


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or name those that are not current."""
    stale = [(path, text) for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    for path, text in stale:
        if "--check" in arguments:
            sys.stderr.write(f"{path} is not current. Run python docs/generate.py.\n")
        else:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{path}\n")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
