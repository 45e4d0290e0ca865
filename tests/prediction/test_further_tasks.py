"""Behind a gate that reads what all tasks share, every likely task is answered."""

from dataclasses import replace

import pytest
import torch
from toy_checkpoints import add_random_expert

from sparse_ft.experts.gates import SequenceGate
from sparse_ft.experts.routing import Routing
from sparse_ft.experts.selection import Selection
from sparse_ft.prediction.routes import Route

HEADS = {"mood": ("text", 2), "about": ("text", 2), "names": ("word", 5)}
LOGITS = torch.tensor([[3.0, 2.5, -4.0], [5.0, 0.0, 0.0], [0.0, 0.1, 0.0], [1.0, 1.0, 9.0]])
"""Of four texts: two likely tasks, one, three, and one that is unknown."""


@pytest.fixture
def model(make_model):
    model = make_model("bert", HEADS, first_block=2)
    add_random_expert(model, "common", seed=9)
    for name in HEADS:
        model.tasks[name] = replace(model.tasks[name], shared="common")
    model.gate = SequenceGate(list(HEADS), 32, block=2, selection=Selection(), trunk_expert="common")
    return model


def routing_of(model):
    weights = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    decided = Routing(LOGITS.argmax(-1, keepdim=True), weights, LOGITS)
    return model.reindexed(decided, model.gate.names)


def test_likely_tasks_are_answered_together(model):
    answered = Route("gate", model).answering(routing_of(model))
    assert answered == [["mood", "about"], ["mood"], ["mood", "about", "names"], []]


@pytest.mark.parametrize("task", HEADS)
def test_each_is_served_by_its_own_expert_where_it_is_answered(model, task):
    route, routing = Route("gate", model), routing_of(model)
    served = route.serving(routing, task).experts[:, 0].tolist()
    for row, answered in enumerate(route.answering(routing)):
        if answered:
            chosen = int(routing.experts[row, 0])
            assert served[row] == (model.experts.index(task) if task in answered else chosen)


def test_a_gate_that_reads_the_bare_backbone_chooses_one(model):
    model.gate.trunk_expert = None
    assert Route("gate", model).answering(routing_of(model)) == [["mood"], ["mood"], ["about"], []]
