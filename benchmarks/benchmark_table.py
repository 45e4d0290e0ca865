"""The table and the picture of what benchmark.py found."""

import statistics
from pathlib import Path

from runs import Entry


def table(entries: list[Entry]) -> str:
    """Draw up the means over the seeds, a row for each task and method."""
    names = ["task", "method", "seeds", "scored by", "validation", "score", "spread", "trained parameters", "seconds"]
    lines = [f"| {' | '.join([*names, 'tokens per second'])} |", "|---|---|---|---" + "|---:" * 6 + "|"]
    for (task, method), rows in _groups(entries).items():
        score = [row["headline"] for row in rows]
        also = [
            f"; {name} {statistics.mean(row['also'][name] for row in rows):.4f}" for name in rows[0].get("also", {})
        ]
        seconds, rates = (
            [row[key] for row in rows if row.get(key) is not None]  # none: in several sessions
            for key in ("seconds", "tokens_per_second")
        )
        cells = [
            task,
            method,
            ", ".join(str(row["seed"]) for row in rows),
            f"{rows[0]['metric']}, {rows[0]['scored_on']}{''.join(also)}",
            f"{statistics.mean(row['validation'] for row in rows):.4f}",
            f"{statistics.mean(score):.4f}",
            f"{statistics.stdev(score):.4f}" if len(score) > 1 else "",
            f"{rows[0]['trainable']:,}",
            f"{statistics.mean(seconds):,.0f}" if seconds else "",
            f"{statistics.mean(rates):,.0f}" if rates else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_means(entries)])


def _means(entries: list[Entry]) -> list[str]:
    """Return a row with the mean over the tasks for each method that has several, of the seeds that all have."""
    groups, lines = _groups([entry for entry in entries if entry.get("counted", True)]), []
    for method in dict.fromkeys(method for _, method in groups):
        rows = {
            task: {row["seed"]: row["headline"] for row in found}
            for (task, own), found in groups.items()
            if own == method
        }
        seeds = sorted(set.intersection(*(set(scores) for scores in rows.values())))
        means = [statistics.mean(scores[seed] for scores in rows.values()) for seed in seeds]
        if len(rows) > 1 and means:
            spread = f"{statistics.stdev(means):.4f}" if len(means) > 1 else ""
            named = ", ".join(map(str, seeds))
            lines.append(
                f"| mean of {len(rows)} | {method} | {named} | | | {statistics.mean(means):.4f} | {spread} | | | |"
            )
    return lines


def _groups(entries: list[Entry]) -> dict[tuple[str, str], list[Entry]]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry["seed"]):
        groups.setdefault((entry["task"], entry["method"]), []).append(entry)
    return dict(sorted(groups.items()))


def plot(entries: list[Entry], path: Path) -> None:
    """Draw the score of each task and method against trained parameters and seconds, a point a run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    for (task, method), rows in _groups(entries).items():
        style = {"color": f"C{methods.index(method)}", "marker": "os^Dvp*X"[tasks.index(task) % 8], "alpha": 0.8}
        score = [row["headline"] for row in rows]
        for axes, key in ((left, "trainable"), (right, "seconds")):
            axes.scatter([row.get(key) or float("nan") for row in rows], score, label=f"{task}, {method}", **style)
    for axes, name in ((left, "trained parameters"), (right, "seconds")):
        axes.set_xlabel(name)
        low, high = axes.get_xlim()
        if high > 10 * max(low, 1):
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    left.set_ylabel("score")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def section(title: str, command: str, entries: list[Entry]) -> str:
    """Write a section of results.md: the command, where it ran, and the table."""
    machines = list(dict.fromkeys(entry["about"] for entry in entries))
    return f"\n## {title}\n\n`{command}`, {'; and '.join(machines)}\n\n{table(entries)}\n"
