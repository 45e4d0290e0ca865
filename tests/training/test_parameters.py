"""What learns in a run, in which groups and at which rate, and how tied parameters stay equal."""

from dataclasses import replace

import pytest
import torch

from sparse_ft.config import load_config
from sparse_ft.experts.gates import SequenceGate, TokenGate
from sparse_ft.experts.selection import Selection
from sparse_ft.training.parameters import build_optimizer, task_groups

HEADS = {"mood": ("text", 2), "names": ("word", 5), "kept": ("text", 3)}
TRAINED = ["mood", "names"]


@pytest.fixture
def model(make_model):
    return make_model("bert", HEADS, targets=["query"], rank=2)


def joint(model, *, gate="token", pool=(), shared=None, **settings):
    """Let the trained tasks be mixed, and return their one group."""
    for task in TRAINED:
        slot = model.tasks[task]
        model.tasks[task] = replace(slot, experts=tuple(pool) or slot.experts, joint=True, shared=shared)
    names = list(pool) or model.routed
    if gate == "token":
        model.gate = TokenGate(names, 32, blocks=[0, 1, 2], selection=Selection(top_k=2))
    else:
        model.gate = SequenceGate(names, 32, block=1, selection=Selection(top_k=2))
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return task_groups(model, TRAINED, run=load_config(overrides=overrides, values={"stage": "joint"}))["joint"]


def owners(parameters):
    return {name.partition("/")[0] for name in parameters}


def test_experts_alone_are_a_group_for_each_task(model):
    groups = task_groups(model, TRAINED, run=load_config())
    assert {name: (group.tasks, owners(group.parameters)) for name, group in groups.items()} == {
        "mood": (["mood"], {"mood"}),
        "names": (["names"], {"names"}),
    }
    assert not any(group.tied for group in groups.values())


def test_tasks_that_share_an_expert_are_one_group_that_learns_once(model):
    model.tasks["kept"] = replace(model.tasks["kept"], experts=("mood",))
    groups = task_groups(model, ["mood", "names", "kept"], run=load_config())
    assert {name: group.tasks for name, group in groups.items()} == {"names": ["names"], "mood+kept": ["mood", "kept"]}
    learnt = [id(value) for group in groups.values() for value in group.parameters.values()]
    assert len(set(learnt)) == len(learnt)
    assert owners(groups["mood+kept"].parameters) == {"mood", "kept"}


@pytest.mark.parametrize(("gate", "learnt"), [
    ("token", {"gate/gate.0.weight", "gate/gate.1.weight", "gate/gate.2.weight"}),
    ("sequence", {"gate/gate.0.weight", "gate/gate.0.bias", "gate/gate.2.weight", "gate/gate.2.bias"}),
])  # fmt: skip
def test_a_joint_run_is_one_group_with_the_gate_and_without_what_is_not_trained(model, gate, learnt):
    group = joint(model, gate=gate)
    assert group.tasks == TRAINED
    assert owners(group.parameters) == {"mood", "names", "gate"}
    assert {name for name in group.parameters if name.startswith("gate/")} == learnt
    assert sum(name.startswith("mood/head.") for name in group.parameters) == 2
    assert sum(name.startswith("mood/expert.") for name in group.parameters) == 6  # A and B of three layers
    assert len({id(parameter) for parameter in group.parameters.values()}) == len(group.parameters)


def pooled(model, *, shared=False):
    """Add three experts that begin with the same A, and one that all share."""
    modules = model.backbone.select_linears(first_block=0, targets=["query"])
    names = ["pool-0", "pool-1", "pool-2"]
    for name in [*names, *(["shared"] if shared else [])]:
        drawn_as = "pool" if name != "shared" else None
        model.experts.create(name, modules=modules, rank=2, alpha=4, seed=1, drawn_as=drawn_as)
    return names


def test_experts_of_a_pool_learn_once_for_all_tasks_with_an_a_that_is_tied_layer_by_layer(model):
    names = pooled(model, shared=True)
    group = joint(model, pool=names, shared="shared", experts__shared_a=True, experts__pool=3)
    assert owners(group.parameters) == {"mood", "names", "gate", "pool-0", "pool-1", "pool-2", "shared"}
    assert not any(name.startswith("mood/expert.") for name in group.parameters)
    assert len({id(parameter) for parameter in group.parameters.values()}) == len(group.parameters)
    expected = [
        {id(group.parameters[f"{name}/expert.{module}.lora_A"]) for name in names} for module in model.experts.layers
    ]
    assert [{id(parameter) for parameter in tied} for tied in group.tied] == expected  # not that of the shared expert
    assert all(torch.equal(tied[0], other) for tied in group.tied for other in tied[1:])


def test_tied_parameters_get_the_sum_of_their_gradients_and_stay_equal(model):
    group = joint(model, pool=pooled(model), experts__shared_a=True, experts__pool=3)
    optimizer = build_optimizer(group.parameters, load_config())
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        sums = []
        for tied in group.tied:
            for parameter in tied:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == 1:
                tied[1].grad = None  # no row of the batch chose this expert
            sums.append(sum(parameter.grad for parameter in tied if parameter.grad is not None))
        group.sum_tied()
        for tied, expected in zip(group.tied, sums, strict=True):
            assert all(torch.equal(parameter.grad, tied[0].grad) for parameter in tied)
            torch.testing.assert_close(tied[0].grad, expected)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(tied[0], other) for tied in group.tied for other in tied[1:])


def test_gate_heads_and_experts_have_rates_of_their_own(model):
    group = joint(model)
    overrides = ["train.learning_rate=0.1", "train.head_learning_rate=0.2", "gate.learning_rate=0.3"]
    optimizer = build_optimizer(group.parameters, load_config(overrides=overrides))
    rates = {id(parameter): each["lr"] for each in optimizer.param_groups for parameter in each["params"]}
    expected = {"expert": 0.1, "head": 0.2, "gate": 0.3}
    for name, parameter in group.parameters.items():
        assert rates[id(parameter)] == expected[name.partition("/")[2].partition(".")[0]], name
    assert len(rates) == len(group.parameters)
    assert all(each["base_lr"] == each["lr"] for each in optimizer.param_groups)


def test_a_head_without_a_rate_of_its_own_has_that_of_the_experts(model):
    optimizer = build_optimizer(joint(model).parameters, load_config(overrides=["train.learning_rate=0.1"]))
    assert sorted({each["lr"] for each in optimizer.param_groups}) == [0.001, 0.1]
