"""One model, several tasks: batches, heads, training. Each family: contracts/test_families.py."""

import random
from itertools import chain

import pytest
import torch
from toy_checkpoints import add_random_expert, trainable_of
from toy_models import SENTENCES, THREE_HEADS, assert_same_logits, one_by_one, rows_of, run_rows, three_tasks

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.errors import ConfigError
from sparse_ft.experts.model import SparseExpertModel

# Same text, same answer.


@pytest.mark.parametrize("family", ["bert", "gpt2", "deberta-v2"])
def test_any_order_and_any_company_give_the_same_logits(make_model, family):
    model = three_tasks(make_model, family)
    expected = one_by_one(model, "topic")
    generator = random.Random(0)
    rows = rows_of(model, "topic")
    company = {"mood": rows_of(model, "mood"), "names": rows_of(model, "names", ["fox " * 30, "in London", "a"])}
    for _ in range(6):
        order = generator.choices(range(len(rows)), k=generator.randint(1, 6))
        tasks = generator.sample(list(company), k=generator.randint(0, 2))
        before = [row for task in tasks[:1] for row in generator.sample(company[task], k=2)]
        after = [row for task in tasks[1:] for row in generator.sample(company[task], k=3)]
        with torch.no_grad():
            got = run_rows(model, [*before, *(rows[index] for index in order), *after])["topic"]
        assert_same_logits(got, expected[order])


def test_one_thread_and_two_give_the_same_answers(make_model):
    model = three_tasks(make_model, "bert")
    rows = [row for task in THREE_HEADS for row in rows_of(model, task, SENTENCES * 8)]
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(run_rows(model, rows))
    finally:
        torch.set_num_threads(1)
    for task in THREE_HEADS:
        assert_same_logits(results[1][task], results[0][task])


# The last gives token types to a model that knows none, as uer/gpt2-chinese-cluecorpussmall does.
@pytest.mark.parametrize(("family", "tokenizer"), [("bert", "bert"), ("deberta-v2", "deberta-v2"), ("gpt2", "bert")])
def test_pairs_beside_single_texts_answer_as_alone(tiny_folder, family, tokenizer):
    backbone = load_backbone(str(tiny_folder(family)), tokenizer_folder=tiny_folder(tokenizer))
    model = SparseExpertModel(backbone).eval()
    encoder = Encoder(backbone, max_length=64)
    for task in ("single", "pair"):
        add_random_expert(model, task)
        model.add_task(task, expert=task, level="text", num_outputs=4).initialise(seed=0, name=task)
    rows = {
        "single": [("single", example) for example in encoder.texts(SENTENCES)],
        "pair": [("pair", example) for example in encoder.texts(SENTENCES, SENTENCES[::-1])],
    }
    with torch.no_grad():
        together = run_rows(model, rows["single"] + rows["pair"])
        for task, own in rows.items():
            assert_same_logits(together[task], torch.cat([run_rows(model, [row])[task] for row in own]))


def test_two_tasks_may_share_an_expert(make_model):
    model = make_model("bert", {"mood": ("text", 3)})
    model.add_task("topic", expert="mood", level="text", num_outputs=9)
    together = run_rows(model, [*rows_of(model, "mood"), *rows_of(model, "topic")])
    assert_same_logits(together["mood"], one_by_one(model, "mood"))
    assert_same_logits(together["topic"], one_by_one(model, "topic"))
    assert set(trainable_of(model, "mood")) == set(trainable_of(model, "topic"))


# Heads.


def test_a_task_may_be_called_like_an_attribute_of_a_module(make_model):
    names = ["type", "keys", "training", "forward", "pop", "_modules", "weight", "T_destination"]
    model = make_model("bert", dict.fromkeys(names, ("text", 3)))
    logits = run_rows(model.train(), [row for name in names for row in rows_of(model, name)])
    sum(own.sum() for own in logits.values()).backward()
    assert all(parameter.grad is not None for name in names for parameter in trainable_of(model, name).values())
    model.eval().to(torch.float32)
    assert list(model.tasks) == names


def test_a_batch_of_texts_without_a_word_has_no_word_logits(make_model):
    model = make_model("bert", {"names": ("word", 5), "mood": ("text", 3)})
    together = run_rows(model, [*rows_of(model, "names", ["", ""]), *rows_of(model, "mood")])
    assert together["names"].shape == (0, 5)
    assert_same_logits(together["mood"], one_by_one(model, "mood"))
    together["names"].sum().backward()


def test_unknown_names_are_refused_with_the_closest_one(make_model):
    model = make_model("bert", {"mood": ("text", 3), "topic": ("text", 3)})
    with pytest.raises(
        ConfigError, match=r"Unknown task in this model 'topics'\. Did you mean 'topic'\? Known: mood, topic\."
    ):
        model.head("topics")
    with pytest.raises(ConfigError, match=r"Unknown expert 'modd'\. Did you mean 'mood'\?"):
        model.add_task("new", expert="modd", level="text", num_outputs=2)
    assert set(model.tasks) == {"mood", "topic"}


# Training.


@pytest.mark.parametrize("family", ["bert", "gpt2", "deberta-v2"])
def test_the_gradient_of_a_batch_of_several_tasks_is_that_of_its_tasks_alone(make_model, family):
    model = three_tasks(make_model, family)
    assert model.backbone.family.routes_rows == (family != "deberta-v2")  # which runs expert by expert
    rows = {task: rows_of(model, task) for task in THREE_HEADS}
    sum(
        logits.square().mean() for logits in run_rows(model, list(chain.from_iterable(rows.values()))).values()
    ).backward()
    together = {task: {name: value.grad for name, value in trainable_of(model, task).items()} for task in THREE_HEADS}
    model.zero_grad(set_to_none=True)
    for task in THREE_HEADS:
        run_rows(model, rows[task])[task].square().mean().backward()
        for name, parameter in trainable_of(model, task).items():
            torch.testing.assert_close(together[task][name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_the_backbones_own_dropout_stays_off_in_training(make_model):
    model = make_model("bert", {"mood": ("text", 3)})
    assert model.backbone.config.hidden_dropout_prob > 0
    expected = one_by_one(model, "mood")
    model.train()
    assert_same_logits(run_rows(model, rows_of(model, "mood"))["mood"], expected)
    model.experts.set_dropout(0.5)
    rows = rows_of(model, "mood")
    assert not torch.equal(run_rows(model, rows)["mood"], run_rows(model, rows)["mood"])
    assert not any(module.training for module in model.eval().modules())
    assert torch.equal(run_rows(model, rows)["mood"], run_rows(model, rows)["mood"])


def test_a_bf16_backbone_answers_and_learns_in_float32(make_model):
    model, exact = three_tasks(make_model, "bert", dtype=torch.bfloat16), three_tasks(make_model, "bert")
    rows = [row for task in THREE_HEADS for row in rows_of(exact, task)]
    got, expected = run_rows(model.train(), rows), run_rows(exact, rows)
    for task in THREE_HEADS:
        assert got[task].dtype == torch.float32
        scale = expected[task].abs().max()
        assert (got[task] - expected[task]).abs().max() < 0.1 * scale  # 8 bits, through three blocks
    sum(logits.sum() for logits in got.values()).backward()
    for task in THREE_HEADS:
        for name, parameter in trainable_of(model, task).items():
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name


def test_a_failed_forward_pass_does_not_lock_the_model(make_model):
    model = make_model("bert", {"mood": ("text", 3)})
    expected = one_by_one(model, "mood")
    batch = collate(rows_of(model, "mood"), pad_id=0)
    batch.input_ids[0, 0] = 10**6
    with pytest.raises(IndexError):
        model(batch)
    assert_same_logits(one_by_one(model, "mood"), expected)


# Real weights.


def test_stories260k_learns_to_tell_two_kinds_of_text_apart(stories260k):
    model = SparseExpertModel(load_backbone(str(stories260k)))
    model.experts.create("mood", modules=model.backbone.select_linears(first_block=3), rank=4, alpha=8.0, seed=0)
    model.add_task("mood", expert="mood", level="text", num_outputs=2).initialise(seed=0, name="mood")
    happy = ["Lily was happy and played outside.", "They laughed and had fun.", "Mom smiled and gave him a big hug."]
    sad = ["Lily was sad and cried at home.", "They were angry and scared.", "Mom was upset and he lost his toy."]
    rows, targets = rows_of(model, "mood", happy + sad), torch.tensor([0, 0, 0, 1, 1, 1])
    optimizer = torch.optim.AdamW(trainable_of(model, "mood").values(), lr=5e-3)
    model.train()
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(run_rows(model, rows)["mood"], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert one_by_one(model.eval(), "mood").shape[0] == len(SENTENCES)


def test_threads_may_run_the_same_model_at_once(make_model):
    from concurrent.futures import ThreadPoolExecutor

    heads = {"mood": ("text", 3), "names": ("word", 5)}
    model = make_model("bert", heads, first_block={"mood": 0, "names": 1})
    encoder = Encoder(model.backbone, max_length=64)
    texts = ["The quick brown fox", "Ada Lovelace met Charles Babbage", "well", "London"]
    batches = [collate([("mood", example)], pad_id=0) for example in encoder.texts(texts)]
    batches += [collate([("names", example)], pad_id=0) for example in encoder.words([text.split() for text in texts])]

    def answer(batch):
        with torch.no_grad():
            return next(iter(model(batch).values()))

    alone = [answer(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for one, other in zip(alone, pool.map(answer, batches), strict=True):
                torch.testing.assert_close(one, other)
