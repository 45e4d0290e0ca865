"""The plan of a pass: rows share every block up to the first that their experts change in different ways."""

import pytest
import torch
from tiny_backbones import FAMILIES
from toy_checkpoints import counted_blocks

from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.experts.gates import TokenGate
from sparse_ft.experts.named_experts import Expert
from sparse_ft.experts.plan import plan_rows
from sparse_ft.experts.routing import Routing
from sparse_ft.experts.selection import Selection

TEXTS = ["Ada Lovelace met Charles in London", "the weather", "Book a table for two in Lisbon tomorrow, please"]
HEADS = {"mood": ("text", 2), "about": ("text", 3), "names": ("word", 5)}


def rows_of(model, tasks, *, texts=TEXTS):
    """Every text for every task, the rows of a task side by side."""
    examples = Encoder(model.backbone, max_length=64).words([text.split() for text in texts])
    pairs = [(task, example) for task in tasks for example in examples]
    return collate(pairs, pad_id=model.backbone.pad_id)


def apart(model, batch, routing=None):
    """Logits of each task of the batch, each computed alone."""
    logits = {}
    for rows in batch.tasks:
        alone = rows_of(model, [rows.task])
        own = None if routing is None else routing.take(slice(rows.start, rows.stop))
        with torch.no_grad():
            logits[rows.task] = model(alone, routing=own)[rows.task]
    return logits


def test_rows_part_where_their_paths_do():
    plan = plan_rows("aabb", ["xyz", "xyw", "xyz", "qyz"], num_blocks=3)
    assert [(part.first_block, part.rows, part.parents, part.bases) for part in plan.stretches] == [
        (0, [0, 2, 3], [], [0, 1, 2]),
        (2, [0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 1, 2]),
    ]
    assert plan.leaves == [0, 1, 2, 3]
    assert plan.row_blocks == 3 * 2 + 4


def test_rows_that_parted_stay_apart_though_their_experts_agree_again():
    plan = plan_rows("aa", ["xyz", "qyz"], num_blocks=3)
    assert plan.row_blocks == 6


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deberta-v2"])
def test_every_family_answers_as_in_passes_of_their_own(make_model, family):
    model = make_model(family, HEADS, first_block={"mood": 2, "about": 1, "names": 1})
    batch = rows_of(model, HEADS)
    together, rows = counted_blocks(model, lambda: model(batch))
    assert rows == [3, 9, 9]
    for task, logits in apart(model, batch).items():
        torch.testing.assert_close(together[task], logits, atol=1e-6, rtol=0)


@pytest.fixture
def model(make_model):
    return make_model("bert", HEADS, first_block={"mood": 2, "about": 2, "names": 2})


def check(model, tasks, expected, *, routing=None):
    batch = rows_of(model, tasks)
    together, rows = counted_blocks(model, lambda: model(batch, routing=routing))
    assert rows == expected
    for task, logits in apart(model, batch, routing).items():
        assert torch.equal(together[task], logits), task


def test_the_bare_blocks_below_all_experts_run_once(model):
    check(model, HEADS, [3, 3, 9])


def test_heads_on_one_expert_are_one_pass(model):
    model.tasks = {name: type(slot)(("mood",), slot.level) for name, slot in model.tasks.items()}
    check(model, HEADS, [3, 3, 3])


def test_a_shared_expert_below_experts_of_their_own(model):
    low = [name for name in model.backbone.linears if model.backbone.block_of(name) < 2]
    model.experts.create("trunk", modules=low, rank=4, alpha=8, seed=5)
    for parameter in model.experts.parameters("trunk").values():
        parameter.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(5))
    model.tasks = {name: type(slot)(slot.experts, slot.level, shared="trunk") for name, slot in model.tasks.items()}
    check(model, HEADS, [3, 3, 9])


def test_copies_under_other_names_are_one_expert(model):
    mood = model.experts.get("mood")
    model.experts.replace(mood)  # which is then no longer in training
    model.experts.add(Expert("copy", mood.alpha, mood.deltas))
    model.tasks["about"] = type(model.tasks["about"])(("copy",), "text")
    check(model, ["mood", "about"], [3, 3, 3])
    next(iter(model.experts.parameters("copy").values())).data.add_(0.1)
    check(model, ["mood", "about"], [3, 3, 6])


def test_word_shapes_part_the_rows_of_an_expert_that_reads_them(model):
    tagger = model.experts.get("names")
    shapes = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
    model.experts.replace(Expert("names", tagger.alpha, tagger.deltas, shapes, 1))
    check(model, HEADS, [3, 6, 9])


def test_rows_without_any_expert_and_rows_of_mixed_experts(model):
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]] * 2)
    routing = Routing(torch.tensor([[0, 1]] * 6), weights)
    check(model, ["mood", "about"], [3, 3, 3], routing=routing)


def test_a_gate_that_decides_at_every_block_reads_each_text_once(model):
    gate = TokenGate(model.experts.names, 32, blocks=[0, 1, 2], selection=Selection(top_k=2))
    gate.initialise(torch.Generator().manual_seed(0))
    batch, routings, alone = rows_of(model, HEADS), {}, {}
    together, rows = counted_blocks(model, lambda: model(batch, gate=gate, block_routings=routings))
    assert rows == [3, 3, 3]
    with torch.no_grad():
        mood = model(rows_of(model, ["mood"]), gate=gate, block_routings=alone)["mood"]
    assert torch.equal(together["mood"], mood)
    for block, routing in alone.items():
        assert torch.equal(routings[block].weights, routing.weights.repeat(3, 1, 1))


def test_texts_of_one_length_that_differ_do_not_share(model):
    batch = rows_of(model, ["mood"], texts=["Ada met", "Ada met", "met Ada"])
    logits, rows = counted_blocks(model, lambda: model(batch)["mood"])
    assert rows == [2, 2, 2]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_training_shares_nothing(model):
    _, rows = counted_blocks(model.train(), lambda: model(rows_of(model, HEADS)))
    assert rows == [9, 9, 9]
