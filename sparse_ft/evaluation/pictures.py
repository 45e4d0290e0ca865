"""Pictures of routings and confusions as PNG: heat maps in one hue, dark for much, on white.

matplotlib is optional and imported where a picture is drawn; figures are made without pyplot, which keeps state.
"""

import contextlib
import importlib.util
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ft.errors import ConfigError
from sparse_ft.evaluation.routing_report import UNKNOWN, RoutingReport
from sparse_ft.evaluation.score_report import TaskReport
from sparse_ft.evaluation.token_routing import TokenRouting
from sparse_ft.evaluation.token_table import shortened, span
from sparse_ft.tasks.kinds.scores import Confusion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG = logging.getLogger("sparse_ft")
_DPI = 130
_WIDTH = 13.0
"""Inches that panels may take side by side; further panels stand below."""
_HEIGHT = 300.0
"""Inches that all panels may take; longer texts have lower rows. A PNG of matplotlib has at most 65,535 dots."""
_MAX_NUMBERS = 20
"""Rows or columns of the largest matrix with numbers in its cells."""
_MAX_NAMES = 200
"""Labels of the largest confusion that names them."""
_MAX_NAME = 32
_COLOURS = "Blues"
# For characters that matplotlib's own font lacks; only those installed are used.
_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS",
    "Noto Emoji", "Symbola",
)  # fmt: skip


def require_matplotlib() -> None:
    """Refuse to draw without matplotlib.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            'Pictures need matplotlib, which is not installed. Install it with `pip install "sparse-ft[plots]"`, or '
            "do without the picture."
        )


def token_picture(routed: TokenRouting) -> bytes:
    """Draw a panel for each expert with its weight on every token (down) in every block (across).

    If the text was routed as a whole, draw a bar for each expert.

    Args:
        routed: As ``route_tokens`` returns it.

    Returns:
        A PNG.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    with _style():
        figure = _token_panels(routed) if routed.by_token else _expert_bars(routed)
        return _png(figure)


def report_pictures(
    tasks: Mapping[str, TaskReport], *, routing: RoutingReport | None, route: str = ""
) -> dict[str, bytes]:
    """Draw the pictures of a report of scores.

    Args:
        tasks: As for ``write_report``.
        routing: The report of the routing; None draws only the tasks.
        route: Name of the route, for the titles.

    Returns:
        File name to PNG: ``confusion_<task>.png`` for each single-label classification, ``routing.png`` (experts by
        tasks) and, where tokens were routed, ``routing_blocks.png`` (the same for each block).

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    pictures = {}
    with _style():
        for name, task in tasks.items():
            confusion = task.score.confusion
            if confusion is not None and len(confusion.labels) > 1:
                pictures[f"confusion_{name}.png"] = _png(_confusion(confusion, title=task.title or name))
        if routing is not None:
            pictures["routing.png"] = _png(_usage(routing, route=route))
            if routing.blocks:
                pictures["routing_blocks.png"] = _png(_blocks(routing, route=route))
    return pictures


def _token_panels(routed: TokenRouting) -> "Figure":
    names = [f"{_shown(expert)}  {weight:.2f}" for expert, weight in routed.usage.items()]
    return _panels(
        {name: routed.weights[..., index].t().tolist() for index, name in enumerate(names)},
        rows=[token.text for token in routed.tokens],
        columns=[str(block) for block in routed.blocks],
        title=f"Route {routed.route}: weight of each expert, and its mean ({span(routed)})",
        across="block",
        cell=(max(0.14, min(0.3, 2.0 / len(routed.blocks))), 0.19),
        top=float(routed.weights.max()) or 1.0,
    )


def _expert_bars(routed: TokenRouting) -> "Figure":
    names = [_shown(expert) for expert in routed.experts]
    weights = list(routed.usage.values())
    figure = _figure(6.0, 1.1 + 0.28 * len(names))
    axes = figure.add_subplot()
    bars = axes.barh(names, weights, color="#2171b5", height=0.7)
    axes.bar_label(bars, labels=[f"{weight:.2f}" for weight in weights], padding=3)
    axes.set(xlim=(0, 1.12 * max(1.0, *weights)), xlabel="weight on every token in every block")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Route {routed.route}: one routing for the whole text ({span(routed)})")
    return figure


def _usage(routing: RoutingReport, *, route: str) -> "Figure":
    """Draw mean weights and shares of rows, tasks down and experts across."""
    tasks = list(routing.usage)
    unknown = [UNKNOWN] if any(UNKNOWN in counts for counts in routing.confusion.values()) else []
    columns = [*routing.experts, *unknown]  # "unknown" has rows, but no weight
    totals = {task: max(1, sum(counts.values())) for task, counts in routing.confusion.items()}
    return _panels(
        {
            "mean weight": [
                [*(routing.usage[task].get(name, 0.0) for name in routing.experts), *(math.nan for _ in unknown)]
                for task in tasks
            ],
            "share of rows by heaviest expert": [
                [routing.confusion[task].get(name, 0) / totals[task] for name in columns] for task in tasks
            ],
        },
        rows=tasks,
        columns=columns,
        title=f"Route {route}: experts that served each task",
        across="expert",
        down="task",
        cell=(0.42, 0.34),
        top=1.0,
        numbers=True,
        legend="weight, share",
    )


def _blocks(routing: RoutingReport, *, route: str) -> "Figure":
    panels = {
        f"block {block}": [[usage[task].get(name, 0.0) for name in routing.experts] for task in usage]
        for block, usage in routing.blocks.items()
    }
    return _panels(
        panels,
        rows=list(next(iter(routing.blocks.values()))),
        columns=routing.experts,
        title=f"Route {route}: mean weight of each expert on the tokens of each task",
        across="expert",
        down="task",
        cell=(0.36, 0.28),
        top=max(value for values in panels.values() for row in values for value in row) or 1.0,
        numbers=True,
    )


def _confusion(confusion: Confusion, *, title: str) -> "Figure":
    """Colour each cell by its share of the rows of the reference label; write the number of rows."""
    size = len(confusion.labels)
    cell = min(0.42, 18 / size)
    names = confusion.labels if size <= _MAX_NAMES else []
    return _panels(
        {"": [[count / max(1, sum(counts)) for count in counts] for counts in confusion.matrix]},
        rows=names,
        columns=names,
        title=f"{title}: rows by label",
        across="predicted",
        down="reference",
        cell=(cell, cell),
        top=1.0,
        texts=[[f"{count:,}" if count else "" for count in counts] for counts in confusion.matrix],
        legend="share of the label's rows",
    )


def _panels(
    panels: Mapping[str, Sequence[Sequence[float]]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    across: str,
    cell: tuple[float, float],
    top: float,
    down: str = "",
    numbers: bool = False,
    texts: Sequence[Sequence[str]] | None = None,
    legend: str = "weight",
) -> "Figure":
    """Draw heat maps of the same rows and columns side by side, with one scale.

    Args:
        panels: Title to the values, [rows, columns].
        rows: Names of the rows; empty for none.
        columns: Names of the columns; empty for none.
        title: Above all panels.
        across: Caption below the columns.
        cell: Width and height of a value, in inches.
        top: The value that is darkest; 0 is white.
        down: Caption beside the rows.
        numbers: Whether the values are written into the cells, if these are few.
        texts: Written into the cells in place of the values.
        legend: Meaning of the values.
    """
    layout = _layout(panels, rows=rows, columns=columns, title=title, cell=cell)
    figure = _figure(*layout.size)
    grid = figure.subplots(layout.num_rows, layout.num_columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        name, values = list(panels.items())[index]
        image = axes.imshow(values, cmap=_COLOURS, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axes.set_title(name)
        _label(axes, rows=rows, columns=columns, cell=layout.cell)
        if index + layout.num_columns >= len(panels):
            axes.set_xlabel(across)
            axes.tick_params(labelbottom=True)
        if index % layout.num_columns == 0:
            axes.set_ylabel(down)
        if max(len(values), len(values[0])) <= _MAX_NUMBERS:
            _write(axes, texts or ([list(map(_number, row)) for row in values] if numbers else []), values, top)
    assert image is not None
    figure.colorbar(image, ax=grid, label=legend, shrink=layout.shrink, anchor=(0.0, 1.0), aspect=12)
    figure.suptitle(title)
    return figure


class _Layout(NamedTuple):
    """The grid of panels in a figure."""

    num_rows: int
    num_columns: int
    cell: tuple[float, float]
    """Width and height of a value in inches, lower than requested where many panels stand above each other."""
    size: tuple[float, float]
    """Width and height of the figure in inches."""
    shrink: float
    """Share of the height that the colour scale takes."""


def _layout(
    panels: Mapping[str, Sequence[Sequence[float]]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    cell: tuple[float, float],
) -> _Layout:
    """Fit panels into a figure of at most ``_WIDTH`` by ``_HEIGHT`` inches, with room for the names."""
    first = next(iter(panels.values()))
    height, width = len(first) * cell[1], len(first[0]) * cell[0]
    room = max(width, 0.09 * max(map(len, panels)), 0.8) + 0.25
    num_columns = max(1, min(len(panels), int(_WIDTH // room)))
    num_rows = -(-len(panels) // num_columns)
    height = min(height, _HEIGHT / num_rows)
    beside = 0.08 * max((len(_shown(name)) for name in rows), default=0)
    below = 0.06 * max((len(_shown(name)) for name in columns), default=0)
    size = max(beside + num_columns * room + 1.6, 0.085 * len(title)), num_rows * (height + below + 0.75) + 0.5
    return _Layout(num_rows, num_columns, (cell[0], height / len(first)), size, min(1.0, 1.6 / (num_rows * height)))


def _label(axes: "Axes", *, rows: Sequence[str], columns: Sequence[str], cell: tuple[float, float]) -> None:
    """Name rows and columns, and draw thin lines between the cells."""
    turned: dict[str, Any] = {}
    if max((len(name) for name in columns), default=0) > 3:
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if cell[0] > 0.2 else {"rotation": 90}
    axes.set_xticks(range(len(columns)), list(map(_shown, columns)), size=min(8, 60 * cell[0]), **turned)
    axes.set_yticks(range(len(rows)), list(map(_shown, rows)), size=min(8, 60 * cell[1]))
    axes.tick_params(length=0)
    axes.spines[:].set_color("#bbbbbb")
    if rows:
        axes.set_xticks([index + 0.5 for index in range(len(columns) - 1)], minor=True)
        axes.set_yticks([index + 0.5 for index in range(len(rows) - 1)], minor=True)
        axes.grid(which="minor", color="#e5e5e5", linewidth=0.6)
        axes.tick_params(which="minor", length=0)


def _write(axes: "Axes", texts: Sequence[Sequence[str]], values: Sequence[Sequence[float]], top: float) -> None:
    for down, row in enumerate(texts):
        for across, text in enumerate(row):
            colour = "white" if values[down][across] > 0.6 * top else "black"
            axes.text(across, down, text, ha="center", va="center", color=colour, size=7)


def _shown(name: str) -> str:
    return shortened(name, width=_MAX_NAME)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Set fonts; labels are text, never formulas."""
    require_matplotlib()
    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in _FONTS if name in installed)]
    sizes: Any = {"font.size": 8, "axes.titlesize": 8, "figure.titlesize": 9}
    with matplotlib.rc_context({**sizes, "font.family": fonts, "text.parse_math": False}):
        yield


def _figure(width: float, height: float) -> "Figure":
    """Make an empty figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _png(figure: "Figure") -> bytes:
    stream = BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(stream, format="png", dpi=_DPI)
    if any("missing from font" in str(entry.message) for entry in caught):
        _LOG.warning(
            "Some characters of the picture are in none of the fonts installed here and are drawn as boxes. Install "
            "one that has them, e.g. Noto Sans CJK SC for Chinese."
        )
    return stream.getvalue()
