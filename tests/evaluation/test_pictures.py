"""Pictures: that they are PNGs, show what they should, and can be drawn of anything."""

import logging
import sys
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from toy_checkpoints import routed

from sparse_ft.errors import ConfigError
from sparse_ft.evaluation import pictures
from sparse_ft.evaluation.pictures import report_pictures, require_matplotlib, token_picture
from sparse_ft.evaluation.routing_report import RoutingReport
from sparse_ft.evaluation.score_report import TaskReport
from sparse_ft.tasks.kinds.scores import score_classification

image = pytest.importorskip("matplotlib.image")


def pixels(png):
    """Return [height, width, 3] of a PNG, 0 to 1."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return torch.tensor(image.imread(BytesIO(png), format="png"))[..., :3]


def num_colours(png):
    return len(pixels(png).flatten(0, 1).unique(dim=0))


def report(tasks, experts, *, blocks=0, unknown=0):
    usage = {task: {expert: 1 / len(experts) for expert in experts} for task in tasks}
    confusion = {task: {experts[0]: 3, **({"unknown": unknown} if unknown else {})} for task in tasks}
    entropy, own = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, experts[0])
    return RoutingReport(list(experts), confusion, usage, entropy, own, dict.fromkeys(range(blocks), usage))


def test_tokens_are_drawn_dark_where_an_expert_has_weight():
    view = routed(2, 3, top_k=1)
    empty = routed(2, 3, top_k=1)
    empty.weights.zero_()
    drawn, blank = pixels(token_picture(view)), pixels(token_picture(empty))
    assert drawn[0, 0].tolist() == [1.0, 1.0, 1.0]  # a light background
    dark = [((image[..., 2] - image[..., 0]) > 0.3).float().mean() for image in (drawn, blank)]
    assert dark[0] > 0.2 > 0.05 > dark[1]  # half of the cells, against the colour bar alone
    assert num_colours(token_picture(view)) > 20


def test_one_choice_for_the_text_is_drawn_as_bars():
    bars, grid = token_picture(routed(3, by_token=False)), token_picture(routed(3))
    assert pixels(bars).shape != pixels(grid).shape
    assert num_colours(bars) > 5


@pytest.mark.parametrize(("num_experts", "num_blocks", "num_tokens"), [(1, 1, 1), (7, 3, 12)])
def test_any_number_of_experts_blocks_and_tokens(num_experts, num_blocks, num_tokens):
    height, width, _ = pixels(token_picture(routed(num_experts, num_blocks, texts=["token"] * num_tokens))).shape
    assert width < 3000
    assert height > 20 * num_tokens


def test_dollars_blanks_and_control_characters_are_drawn_as_they_are():
    assert num_colours(token_picture(routed(2, texts=["$", "a$b$c", " ", "\n", "\\frac{", "_^", ""]))) > 20


def test_characters_that_no_font_has_are_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        token_picture(routed(2, texts=["\U00012000", "\U00012001"]))  # cuneiform
    assert len(caplog.messages) == 1
    assert "in none of the fonts installed here and are drawn as boxes. Install one that has them" in caplog.text
    caplog.clear()
    token_picture(routed(2, texts=["Ada", "ß"]))
    assert caplog.messages == []


def test_a_report_has_a_picture_for_each_confusion_and_for_the_routing():
    topic = TaskReport(score_classification(["a", "b", "b"], ["a", "b", "a"], labels=["a", "b"]))
    names = list(report_pictures({"topic": topic}, routing=None))
    assert names == ["confusion_topic.png"]
    whole = report_pictures({"topic": topic}, routing=report(["topic", "ner"], ["topic", "ner"]), route="gate")
    assert list(whole) == ["confusion_topic.png", "routing.png"]
    tokens = report_pictures({}, routing=report(["topic"], ["topic", "ner"], blocks=5, unknown=2), route="arrow")
    assert list(tokens) == ["routing.png", "routing_blocks.png"]
    for png in [*whole.values(), *tokens.values()]:
        assert num_colours(png) > 20
        assert pixels(png)[0, 0].tolist() == [1.0, 1.0, 1.0]


def test_blocks_are_drawn_of_the_tasks_that_were_routed_by_token():
    whole, tokens = (report(tasks, ["topic", "ner"], blocks=3) for tasks in (["plain", "topic"], ["topic"]))
    figure = pictures._blocks(replace(whole, blocks=tokens.blocks), route="gate")
    shown = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert "topic" in shown
    assert "plain" not in shown


@pytest.mark.parametrize("size", [2, 21, 201])
def test_confusions_of_any_number_of_labels(size):
    labels = [f"intent_{number}" for number in range(size)]
    score = score_classification(labels, [*labels[1:], labels[0]], labels=labels)
    (png,) = report_pictures({"intent": TaskReport(score)}, routing=None).values()
    height, width, _ = pixels(png).shape
    assert max(height, width) < 4000
    assert min(height, width) > 100


def test_a_confusion_of_one_label_is_not_drawn():
    score = score_classification(["a"], ["a"], labels=["a"])
    assert report_pictures({"t": TaskReport(score)}, routing=None) == {}


def test_without_matplotlib_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (require_matplotlib, lambda: token_picture(routed(2)), lambda: report_pictures({}, routing=None)):
        with pytest.raises(ConfigError, match=r'need matplotlib, .*`pip install "sparse-ft\[plots\]"`'):
            draw()


def test_drawing_leaves_nothing_behind_in_matplotlib():
    import matplotlib
    from matplotlib import pyplot

    before, figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    token_picture(routed(2))
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == figures
