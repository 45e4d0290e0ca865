"""Describe the bundled tasks, one task, or one checkpoint in text."""

from pathlib import Path
from typing import Any

from sparse_ft.checkpoint.manifest import (
    Manifest,
    TaskEntry,
    TextGateEntry,
    TokenGateEntry,
    read_manifest,
    read_metrics,
    read_spec,
)
from sparse_ft.evaluation.tables import text_table
from sparse_ft.paths import user_path
from sparse_ft.tasks.spec import FileSource, HubSource, TaskSpec, list_tasks, load_task


def describe_tasks() -> str:
    """List the bundled tasks; tasks with a bundled sample come first."""
    specs = {name: load_task(name) for name in list_tasks()}
    order = sorted(specs, key=lambda name: (not _brings_data(specs[name]), name))
    rows = [
        [name, specs[name].kind, specs[name].language, _num_labels(specs[name]), _where(specs[name])] for name in order
    ]
    table = _table(["task", "kind", "language", "labels", "data"], rows)
    return f"{table}\n\n`sparse-ft tasks NAME` shows one; `--task ./my.yaml` takes your own."


def describe_task(name: str) -> str:
    """Show the kind, data source, labels and example of one task."""
    spec = load_task(name)
    lines = [
        f"{spec.name}: {spec.description}".rstrip(": "),
        f"kind:     {spec.kind} ({spec.language}), scored by {spec.metric}",
        f"data:     {_where(spec)}",
    ]
    if spec.files is not None:
        lines.append(f"files:    {_files(spec.files)}")
    if spec.hub is not None:
        lines.append(f"hub:      {_hub(spec.hub)}")
    labels = ", ".join(spec.label_names or []) or ("read from train" if spec.has_labels else "named by each row")
    lines.append(f"labels:   {labels}")
    facts = {"out of scope": spec.out_of_scope, "example": spec.example, "license": spec.license, "source": spec.source}
    lines.extend(f"{key + ':':<9} {value}" for key, value in facts.items() if value)
    return "\n".join(lines)


def describe_checkpoint(path: Path) -> str:
    """Show the backbone, the experts with their sizes, and the tasks with their scores."""
    path = user_path(path)
    manifest, metrics = read_manifest(path), read_metrics(path)
    backbone = manifest.backbone
    lines = [
        f"checkpoint: {path} (format {manifest.format}, sparse-ft {manifest.versions.get('sparse_ft', '?')})",
        f"backbone:   {backbone.name} (sha256 {backbone.weights_sha256[:12]}…), "
        f"experts from block {manifest.first_block}, {manifest.pooling} pooling",
        f"gate:       {_gate(manifest.gate, metrics)}",
        *(
            []
            if manifest.passes is None
            else [f"passes:     {manifest.passes:.2f} for the answers of all tasks to a text"]
        ),
        "",
        _table(["expert", "rank", "alpha", "layers", "MB", "tasks"], _expert_rows(manifest)),
        "",
        _table(["task", "expert", "kind", "labels", "MB", "scores"], _task_rows(path, manifest, metrics)),
    ]
    return "\n".join(lines)


def _gate(gate: TextGateEntry | TokenGateEntry | None, metrics: dict[str, Any]) -> str:
    if gate is None:
        return "none; all tasks answer, unless some are named"
    shares = {task: entry["routing_accuracy"] for task, entry in metrics.items() if "routing_accuracy" in entry}
    right = ", ".join(f"{task} {share:.3f}" for task, share in shares.items())
    threshold = f", unknown below {gate.min_confidence:g}" if gate.min_confidence else ""
    reads = f"blocks 0 to {gate.block}" if isinstance(gate, TextGateEntry) else "every block with experts"
    expert = gate.trunk_expert if isinstance(gate, TextGateEntry) else None
    through = f", with the expert {expert!r}" if expert else ""
    about = f"{gate.type}, top {gate.top_k}, reads what enters {reads}{through}{threshold}"
    groups = gate.groups if isinstance(gate, TextGateEntry) else []
    together = [f"{', '.join(group[:-1])} and {group[-1]} are answered together" for group in groups]
    about = "; ".join([about, *together])
    return f"{about}; right on validation rows: {right}" if right else about


def _expert_rows(manifest: Manifest) -> list[list[str]]:
    return [
        [
            name,
            str(entry.rank),
            f"{entry.alpha:g}",
            str(entry.layers),
            _megabytes(manifest, f"experts/{name}/"),
            ", ".join(task for task, served in manifest.tasks.items() if name in served.used) or "none",
        ]
        for name, entry in manifest.experts.items()
    ]


def _task_rows(path: Path, manifest: Manifest, metrics: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, entry in manifest.tasks.items():
        spec = read_spec(path / "tasks" / f"{name}.yaml")
        scores = metrics.get(name, {})
        first = list(scores.get("metrics", {}).items())[:2]
        shown = [f"{key} undefined" if value is None else f"{key} {value:.3f}" for key, value in first]
        split = f" on {scores.get('split')} ({scores.get('n')} rows)" if shown else ""
        rows.append(
            [
                name,
                _served_by(entry),
                entry.kind,
                _num_labels(spec),
                _megabytes(manifest, f"heads/{name}."),
                "  ".join(shown) + split,
            ]
        )
    return rows


def _served_by(entry: TaskEntry) -> str:
    experts = entry.served_by
    named = ", ".join(experts) if len(experts) <= 3 else f"{experts[0]} and {len(experts) - 1} others"
    shared = f" + {entry.shared}" if entry.shared else ""
    return f"{named}{shared}, mixed by the gate" if entry.mixed else named + shared


def _megabytes(manifest: Manifest, prefix: str) -> str:
    size = sum(size for name, size in manifest.bytes.items() if name.startswith(prefix))
    return f"{size / 1e6:.2f}"


def _num_labels(spec: TaskSpec) -> str:
    return str(len(spec.label_names)) if spec.label_names else "-"


def _brings_data(spec: TaskSpec) -> bool:
    return spec.files is not None and spec.files.root is not None


def _where(spec: TaskSpec) -> str:
    if _brings_data(spec):
        return "bundled sample"
    return "hub, or --data FOLDER" if spec.hub is not None else "--data FOLDER"


def _files(files: FileSource) -> str:
    parts = [f"{split} {getattr(files, split)}" for split in ("train", "validation", "test") if getattr(files, split)]
    return f"{files.format}: " + "; ".join(parts)


def _hub(hub: HubSource) -> str:
    return hub.path + (f" ({hub.name})" if hub.name else "") + (f" @ {hub.revision}" if hub.revision else "")


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(text_table(header, rows, num_text_columns=len(header)))
