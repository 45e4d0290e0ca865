"""An opinion monitor: how does the share of negative posts on each topic change over the weeks?

Train once (a few minutes), then run (needs matplotlib: `pip install "sparse-ft[plots]"`):

    sparse-ft train --task topic --task sentiment --output runs/monitor
    python examples/opinion_monitor/monitor.py --checkpoint runs/monitor --output trend.png

Reads the posts as a stream, draws the trend, and prints an alert when the negative share of a topic jumps: by more than
`--jump` above its mean over the weeks before, with at least `--least` posts in the week.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import sparse_ft

HERE = Path(__file__).parent
Week = date
"""The Monday that it begins with."""


def read_posts(path: Path) -> Iterator[tuple[Week, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            day = date.fromisoformat(row["date"])
            yield day - timedelta(days=day.weekday()), row["text"]


def count(model: sparse_ft.LoadedModel, posts: Path) -> dict[str, dict[Week, list[bool]]]:
    """Sort posts by topic and week; each is negative or not."""
    weeks = (week for week, _ in read_posts(posts))
    answers = model.stream((text for _, text in read_posts(posts)), ["topic", "sentiment"])
    results: dict[str, dict[Week, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for week, answer in zip(weeks, answers, strict=True):
        negative = answer.tasks["sentiment"]["label"] == "negative"
        results[answer.tasks["topic"]["label"]][week].append(negative)
    return results


def find_alerts(weeks: dict[Week, list[bool]], *, jump: float, least: int) -> list[tuple[Week, float, float]]:
    """Return weeks whose negative share jumps, with that share and the mean share of the weeks before."""
    alerts, before = [], []
    for week in sorted(weeks):
        share = sum(weeks[week]) / len(weeks[week])
        usual = sum(before) / len(before) if before else share
        if share - usual > jump and len(weeks[week]) >= least:
            alerts.append((week, share, usual))
        before.append(share)
    return alerts


def draw(
    results: dict[str, dict[Week, list[bool]]], alerts: dict[str, list[tuple[Week, float, float]]], path: Path
) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, (topic, weeks) in enumerate(sorted(results.items())):
        order = sorted(weeks)
        shares = [100 * sum(weeks[week]) / len(weeks[week]) for week in order]
        number = sum(map(len, weeks.values()))
        (line,) = axes.plot(order, shares, marker="osD^v"[index % 5], label=f"{topic} ({number} posts)")
        for week, share, _ in alerts[topic]:
            axes.plot(week, 100 * share, marker="o", markersize=18, fillstyle="none", color=line.get_color())
            axes.annotate("alert", (week, 100 * share), xytext=(0, 13), textcoords="offset points", ha="center")
    all_weeks = sorted({week for weeks in results.values() for week in weeks})
    axes.set_xticks(all_weeks, [f"{week:%d %b}" for week in all_weeks])
    axes.set(title="Negative posts by topic", xlabel="week beginning", ylabel="share of posts, %", ylim=(-5, 118))
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="With the tasks topic and sentiment.")
    parser.add_argument("--posts", type=Path, default=HERE / "posts.csv", help="CSV with date and text, by date.")
    parser.add_argument("--output", type=Path, default=Path("trend.png"), help="Picture to write.")
    parser.add_argument("--jump", type=float, default=0.3)
    parser.add_argument("--least", type=int, default=3)
    options = parser.parse_args()

    results = count(sparse_ft.load(options.checkpoint), options.posts)
    alerts = {
        topic: find_alerts(weeks, jump=options.jump, least=options.least) for topic, weeks in sorted(results.items())
    }
    for topic, entries in alerts.items():
        for week, share, usual in entries:
            print(f"ALERT {topic}, week of {week}: {share:.0%} negative, {usual:.0%} in the weeks before")
    print(f"{sum(len(posts) for weeks in results.values() for posts in weeks.values())} posts read.")
    draw(results, alerts, options.output)
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    main()
