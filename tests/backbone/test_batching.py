import math
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch

from sparse_ft.backbone.batching import MIXTURES, collate, draw_rows, epoch_batches, length_batches
from sparse_ft.backbone.encoding import Example

SIZES = {"small": 7, "middle": 100, "large": 1000}


def conll_lengths(count, seed=0):
    """Lengths as in CoNLL-2003 in word pieces: most sentences short, a few very long."""
    generator = random.Random(seed)
    return [min(128, 2 + int(generator.lognormvariate(2.7, 0.7))) for _ in range(count)]


def draw(mixture, sizes=SIZES, seed=0):
    return draw_rows(sizes, mixture=mixture, generator=random.Random(seed))


# The mixture.


@pytest.mark.parametrize("sizes", [SIZES, {"only": 5}, {"a": 1, "b": 1, "c": 1}, {"a": 3, "b": 3333333 // 1000}])
def test_proportional_draws_every_row_exactly_once(sizes):
    drawn = draw("proportional", sizes)
    assert sorted(drawn) == sorted((task, row) for task, size in sizes.items() for row in range(size))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_shares_are_powers_of_the_sizes(mixture):
    exponent = {"proportional": 1, "smoothed": 1 / 2, "uniform": 0}[mixture]
    counts = Counter(task for task, _ in draw(mixture))
    total, scale = sum(SIZES.values()), sum(size**exponent for size in SIZES.values())
    for task, size in SIZES.items():
        exact = total * size**exponent / scale
        assert exact - 1e-6 <= counts[task] < exact + 1


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_a_task_are_drawn_equally_often_but_for_one(mixture, seed):
    drawn = Counter(draw(mixture, seed=seed))
    for task, size in SIZES.items():
        times = [drawn[task, row] for row in range(size)]
        assert max(times) - min(times) <= 1


def test_rows_that_are_repeated_or_left_out_differ_from_epoch_to_epoch():
    def extremes(seed):
        drawn = Counter(draw("uniform", seed=seed))
        most = max(drawn["small", row] for row in range(7))
        repeated = frozenset(row for row in range(7) if drawn["small", row] == most)
        return repeated, frozenset(row for row in range(1000) if not drawn["large", row])

    repeated, left_out = zip(*(extremes(seed) for seed in range(12)), strict=True)
    assert len(set(repeated)) > 1
    assert len(set(left_out)) == 12
    assert len(frozenset.intersection(*left_out)) < 20  # 600 of 1000 are left out of each


def test_draws_are_shuffled_and_repeats_come_in_fresh_orders():
    sizes = {"small": 20, "large": 380}
    orders = [row for task, row in draw("uniform", sizes) if task == "small"]
    assert len(orders) == 200
    rounds = [tuple(orders[start : start + 20]) for start in range(0, 200, 20)]
    assert len(set(rounds)) == 10
    tasks = [task for task, _ in draw("uniform", sizes)]
    changes = sum(left != right for left, right in pairwise(tasks))
    assert changes > 100  # 200 expected; 1 if the tasks stood one after the other


# The plan of an epoch.


def plan_of(lengths, **changes):
    settings = {"batch_size": 8, "mixture": "proportional", "seed": 3, "epoch": 0} | changes
    return epoch_batches(lengths, **settings)


@pytest.fixture
def lengths():
    return {"names": conll_lengths(300), "mood": conll_lengths(170, seed=1), "topic": conll_lengths(9, seed=2)}


@pytest.mark.parametrize("across_tasks", [True, False])
@pytest.mark.parametrize("batch_size", [1, 8, 32, 1000])
def test_every_row_is_in_one_batch_and_batches_are_full(lengths, across_tasks, batch_size):
    plan = plan_of(lengths, across_tasks=across_tasks, batch_size=batch_size)
    rows = sorted(pair for batch in plan for pair in batch)
    assert rows == sorted((task, row) for task, own in lengths.items() for row in range(len(own)))
    assert all(1 <= len(batch) <= batch_size for batch in plan)
    groups = [sum(map(len, lengths.values()))] if across_tasks else list(map(len, lengths.values()))
    assert len(plan) == sum(math.ceil(size / batch_size) for size in groups)


def test_rows_of_a_task_are_adjacent_in_a_batch(lengths):
    plan = plan_of(lengths)
    assert any(len({task for task, _ in batch}) > 1 for batch in plan)
    for batch in plan:
        tasks = [task for task, _ in batch]
        changes = sum(left != right for left, right in pairwise(tasks))
        assert changes == len(set(tasks)) - 1


def test_without_mixing_a_batch_holds_one_task_and_tasks_take_turns(lengths):
    plan = plan_of(lengths, across_tasks=False)
    assert all(len({task for task, _ in batch}) == 1 for batch in plan)
    order = [batch[0][0] for batch in plan]
    assert sum(left != right for left, right in pairwise(order)) > 10


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("across_tasks", [True, False])
def test_the_plan_depends_on_its_arguments_only(lengths, mixture, across_tasks):
    random.seed(0)
    torch.manual_seed(0)
    first = plan_of(lengths, mixture=mixture, across_tasks=across_tasks, epoch=2)
    random.seed(1)
    torch.manual_seed(1)
    assert plan_of(lengths, mixture=mixture, across_tasks=across_tasks, epoch=2) == first
    assert plan_of(lengths, mixture=mixture, across_tasks=across_tasks, epoch=3) != first
    assert plan_of(lengths, mixture=mixture, across_tasks=across_tasks, epoch=2, seed=4) != first


def test_seed_and_epoch_are_not_mixed_up(lengths):
    plans = {str(plan_of(lengths, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    plans.add(str(plan_of(lengths, seed=1, epoch=11)))
    plans.add(str(plan_of(lengths, seed=11, epoch=1)))
    assert len(plans) == 11


def padding_share(batches, lengths):
    real = sum(lengths[task][row] for batch in batches for task, row in batch)
    padded = sum(len(batch) * max(lengths[task][row] for task, row in batch) for batch in batches)
    return 1 - real / padded


def test_buckets_leave_little_padding_and_a_random_order():
    lengths = {"names": conll_lengths(6000)}
    plan = plan_of(lengths, batch_size=32)
    random_plan = [[("names", row) for row in range(start, min(start + 32, 6000))] for start in range(0, 6000, 32)]
    assert padding_share(plan, lengths) < 0.1
    assert padding_share(random_plan, lengths) > 0.5
    # Short batches do not come before long ones: the order stays random.
    means = [sum(lengths[task][row] for task, row in batch) / len(batch) for batch in plan]
    half = len(means) // 2
    assert abs(sum(means[:half]) / half - sum(means[half:]) / (len(means) - half)) < 6


def test_collate_pads_masks_and_sorts_by_task():
    rows = [
        ("topic", Example(0, [5, 6, 7], targets=[2])),
        ("topic", Example(1, [5], targets=[-100])),
        ("pair", Example(0, [1, 2, 3, 4], token_type_ids=[0, 0, 1, 1], targets=[0])),
        ("ner", Example(0, [8, 9, 7, 6], word_positions=[1, 3], word_indices=[0, 1], targets=[4, -100])),
        ("ner", Example(1, [8, 9])),
        ("ner", Example(2, [8, 9, 1], word_positions=[2], word_indices=[5], targets=[1])),
        ("many", Example(0, [3, 3], targets=[1.0, 0.0, 1.0])),
        ("many", Example(1, [3], targets=[0.0, 0.0, 0.0])),
        ("new", Example(0, [3, 1])),
    ]
    batch = collate(rows, pad_id=99)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.token_type_ids.shape == (9, 4)
    for index, (_, example) in enumerate(rows):
        size = len(example.input_ids)
        assert batch.input_ids[index].tolist() == example.input_ids + [99] * (4 - size)
        assert batch.attention_mask[index].tolist() == [1] * size + [0] * (4 - size)
        assert batch.token_type_ids[index].tolist() == (example.token_type_ids or [0] * 4)
    assert int(batch.attention_mask.sum()) == sum(len(example.input_ids) for _, example in rows)
    topic, pair, ner, many, new = batch.tasks
    assert [(rows.task, rows.start, rows.stop) for rows in batch.tasks] == [
        ("topic", 0, 2),
        ("pair", 2, 3),
        ("ner", 3, 6),
        ("many", 6, 8),
        ("new", 8, 9),
    ]
    assert topic.targets.tolist() == [2, -100]
    assert topic.targets.dtype == torch.long
    assert topic.words is pair.words is many.words is new.words is new.targets is None
    in_rows, in_tokens = ner.words
    assert (in_rows.tolist(), in_tokens.tolist(), ner.targets.tolist()) == ([3, 3, 5], [1, 3, 2], [4, -100, 1])
    assert many.targets.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert many.targets.dtype == torch.float32


def test_collate_has_no_token_types_where_no_row_has():
    assert collate([("a", Example(0, [1])), ("b", Example(0, [1, 2]))], pad_id=0).token_type_ids is None


# Evaluation and prediction.


@pytest.mark.parametrize("max_tokens", [1, 100, 512, 4096, 10**6])
def test_length_batches_take_every_row_once_within_the_budget(max_tokens):
    lengths = [*conll_lengths(500), 900, 1, 1]
    batches = length_batches(lengths, max_tokens=max_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
    assert [lengths[batch[0]] for batch in batches] == sorted((lengths[batch[0]] for batch in batches), reverse=True)
    for batch, following in pairwise(batches):  # no batch could have taken one row more
        assert (len(batch) + 1) * lengths[batch[0]] > max_tokens
        assert min(lengths[row] for row in batch) >= max(lengths[row] for row in following)


def test_length_batches_of_nothing():
    assert length_batches([], max_tokens=100) == []
