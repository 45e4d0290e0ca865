"""Own blocks under a budget of passes."""

import itertools
import random

import pytest
from toy_checkpoints import add_random_expert

from sparse_ft.experts.heads import TaskSlot
from sparse_ft.training.own_blocks import choose_own_blocks, num_passes


@pytest.mark.parametrize("depths", [(0, 0), (1, 1), (0, 1), (2, 1), (3, 0), (3, 3)])
def test_passes_are_those_of_the_plan(make_model, depths):
    model = make_model("bert", {})
    add_random_expert(model, "shared", seed=3)
    for seed, depth in enumerate(depths):
        name = f"task{seed}"
        add_random_expert(model, name, seed=seed) if depth == 3 else None
        if 0 < depth < 3:
            add_random_expert(model, name, first_block=3 - depth, seed=seed)
        model.add_task(name, expert=name if depth else "shared", level="text", num_outputs=2)
        if depth:
            model.tasks[name] = TaskSlot((name,), "text", shared="shared")
    plan = model.plan(dict.fromkeys(model.tasks, "text"))
    assert num_passes(dict(zip(model.tasks, depths, strict=True)), num_blocks=3) == pytest.approx(plan.passes)


def test_four_tasks_of_six_blocks():
    for numbers, passes in (("1111", 1.5), ("2111", 10 / 6), ("2100", 1.5), ("0000", 1), ("6666", 4)):
        own_blocks = dict(zip("abcd", map(int, numbers), strict=True))
        assert num_passes(own_blocks, num_blocks=6) == pytest.approx(passes)
    reads = {"a": "text", "b": "text", "c": "pair", "d": "pair"}  # which share nothing with each other
    assert num_passes(dict.fromkeys("abcd", 0), num_blocks=6, reads=reads) == 2


def test_the_budget_holds_and_is_used_up():
    generator = random.Random(1)
    for _ in range(200):
        tasks = [f"task{index}" for index in range(generator.randint(1, 6))]
        num_blocks, passes = generator.randint(1, 12), generator.uniform(1, 4)
        drops = {task: generator.uniform(0.001, 1) for task in tasks if generator.random() < 0.8}
        depths = choose_own_blocks(tasks, passes=passes, num_blocks=num_blocks, fixed={}, drops=drops)
        assert list(depths) == tasks
        assert num_passes(depths, num_blocks=num_blocks) <= passes + 1e-6
        for task in tasks:
            more = {**depths, task: depths[task] + 1}
            full = depths[task] == num_blocks
            assert full or num_passes(more, num_blocks=num_blocks) > passes


def test_the_neediest_task_gets_more_and_given_numbers_stay():
    needs = {"sentiment": 0.03, "topic": 0.08, "intent": 0.16, "ner": 0.28}
    chosen = choose_own_blocks(list(needs), passes=1.5, num_blocks=6, fixed={}, drops=needs)
    assert chosen == {"sentiment": 0, "topic": 0, "intent": 1, "ner": 2}
    chosen = choose_own_blocks(list(needs), passes=1.5, num_blocks=6, fixed={"sentiment": 1}, drops=needs)
    assert chosen["sentiment"] == 1
    assert choose_own_blocks(list(needs), passes=1.5, num_blocks=6, fixed={}, drops={}) == dict.fromkeys(needs, 1)
    for order in itertools.permutations(needs):
        same = choose_own_blocks(order, passes=1.67, num_blocks=6, fixed={}, drops=needs)
        assert same == choose_own_blocks(list(needs), passes=1.67, num_blocks=6, fixed={}, drops=needs)
