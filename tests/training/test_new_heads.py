"""Heads of new tasks begin at the means of their classes."""

import numpy as np
import pytest
import safetensors.torch
import torch
from toy_checkpoints import sign
from toys import run, settings, toy_rows, write_rows, write_toy

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.pooling import pool
from sparse_ft.config import RunConfig
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.tasks.spec import load_task
from sparse_ft.training.new_experts import add_tasks
from sparse_ft.training.new_heads import has_start, start_head
from sparse_ft.training.training_task import prepare_task


def started(folder, backbone):
    """Return a model with the head of the toy task in a folder at its start, the task, and the encoder."""
    model = SparseExpertModel(load_backbone(str(backbone)))
    encoder = Encoder(model.backbone, max_length=64)
    task = prepare_task(load_task(str(folder / "mood.yaml")), run=RunConfig(), encoder=encoder)
    add_tasks(model, {"mood": task}, run=RunConfig())
    start_head(model.eval(), task, encoder=encoder)
    return model, task, encoder


def vectors_of(backbone, examples, how):
    """Read texts one by one through a backbone without expert layers: [texts, hidden] float64."""
    bare = load_backbone(str(backbone))
    vectors = []
    for example in examples:
        batch = collate([("", example)], pad_id=bare.pad_id)
        with torch.no_grad():
            hidden = bare.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        vectors.append(pool(hidden, batch.attention_mask, how)[0].double().numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_logits_begin_as_the_cosine_to_each_class_mean(tmp_path, tiny_folder, family):
    write_toy(tmp_path, "mood", sizes=(30, 8, 8))
    model, task, encoder = started(tmp_path, tiny_folder(family))
    labels = task.spec.label_names
    texts = [*encoder.texts(labels), *task.examples]
    own = np.array([*range(len(labels)), *(example.targets[0] for example in task.examples)])
    vectors = vectors_of(tiny_folder(family), texts, model.pooling)
    means = np.stack([vectors[own == label].mean(0) for label in range(len(labels))])
    middle = means.mean(0)
    directions = (means - middle) / np.linalg.norm(means - middle, axis=1, keepdims=True)
    expected = 20 * (vectors - middle) @ directions.T / np.sqrt(len(middle))
    with torch.no_grad():
        batch = collate([("mood", example) for example in task.examples], pad_id=model.backbone.pad_id)
        got = model(batch)["mood"].numpy()
    np.testing.assert_allclose(got, expected[len(labels) :], atol=1e-5)


def test_of_each_class_fifty_rows_are_read(tmp_path, tiny_bert):
    rows = toy_rows("mood", 400, seed=0)
    first, counts = [], dict.fromkeys({row["label"] for row in rows}, 0)
    for row in rows:
        counts[row["label"]] += 1
        first.extend([row] if counts[row["label"]] <= 50 else [])
    assert min(counts.values()) > 50
    heads = []
    for folder, kept in (("all", rows), ("first", first)):
        path = tmp_path / folder
        write_toy(path, "mood")
        write_rows(path / "mood" / "train.jsonl", kept)
        model, _, _ = started(path, tiny_bert)
        heads.append(model.head("mood").linear)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert torch.equal(heads[0].bias, heads[1].bias)


def test_texts_that_are_all_the_same_give_finite_logits(tmp_path, tiny_bert):
    write_toy(tmp_path, "mood")
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "mood" / f"{split}.jsonl", [{"text": "the", "label": label} for label in ("the", "The")])
    model, task, _ = started(tmp_path, tiny_bert)
    with torch.no_grad():
        assert model(collate([("mood", task.examples[0])], pad_id=0))["mood"].isfinite().all()


def test_minilm_knows_classes_by_their_names_and_two_texts_each(tmp_path, minilm):
    texts = {
        "sports": ["They won the cup final on penalties.", "The striker was injured in training."],
        "cooking": ["Simmer the sauce for ten minutes.", "Add a pinch of salt to the dough."],
        "bank_account": ["I cannot see my transfer.", "My card was charged twice."],
    }
    unseen = {"sports": "The goalkeeper saved the match.", "cooking": "Bake it until golden brown.",
              "bank_account": "When is the payment booked?"}  # fmt: skip
    write_toy(tmp_path, "mood")
    rows = [{"text": text, "label": label} for label, own in texts.items() for text in own]
    for split in ("train", "validation"):
        write_rows(tmp_path / "mood" / f"{split}.jsonl", rows)
    model, task, encoder = started(tmp_path, minilm)
    with torch.no_grad():
        batch = collate([("mood", example) for example in encoder.texts(list(unseen.values()))], pad_id=0)
        answers = model(batch)["mood"].argmax(-1).tolist()
    assert [task.spec.label_names[best] for best in answers] == list(unseen)


def test_a_large_class_has_no_more_say_than_a_small_one(tmp_path, minilm):
    """The middle is that between the classes, so rows of the large one are not cut in two."""
    write_toy(tmp_path, "mood")
    good = [f"I loved the {thing}, it was {how}." for thing in ("film", "food", "trip", "book", "hotel", "play")
            for how in ("great", "wonderful", "lovely", "superb")]  # fmt: skip
    bad = ["I hated it, it was awful.", "A boring and terrible waste of money."]
    rows = [{"text": text, "label": label} for label, own in (("good", good), ("bad", bad)) for text in own]
    for split in ("train", "validation"):
        write_rows(tmp_path / "mood" / f"{split}.jsonl", rows)
    model, task, _ = started(tmp_path, minilm)
    with torch.no_grad():
        batch = collate([("mood", example) for example in task.examples], pad_id=0)
        answers = model(batch)["mood"].argmax(-1).tolist()
    assert answers == [task.spec.label_names.index(row["label"]) for row in rows]


@pytest.mark.parametrize(("name", "family", "pooling", "expected"), [
    ("mood", "bert", "auto", True),
    ("mood", "bert", "mean", False),
    ("mood", "gpt2", "auto", False),
    ("reply", "bert", "auto", False),
    ("about", "bert", "auto", False),
    ("names", "bert", "auto", False),
])  # fmt: skip
def test_only_single_texts_of_one_length_have_a_start(tmp_path, tiny_folder, name, family, pooling, expected):
    model = SparseExpertModel(load_backbone(str(tiny_folder(family))), pooling=pooling)
    assert has_start(model, load_task(write_toy(tmp_path, name))) is expected


def test_training_begins_there_and_a_head_that_was_trained_stays_where_it_is(tmp_path, tiny_bert):
    still = {"train__learning_rate": 1e-30, "train__epochs": 1}  # a run that learns nothing
    mood = write_toy(tmp_path, "mood", sizes=(16, 4, 4))
    path = run([mood], tiny_bert, tmp_path / "first", **still).path
    expected = started(tmp_path, tiny_bert)[0].head("mood").linear.weight
    linear = sparse_ft.load(path, device="cpu").checkpoint.model.head("mood").linear
    torch.testing.assert_close(linear.weight, expected, rtol=0, atol=1e-6)
    file = path / "heads" / "mood.safetensors"
    doubled = {name: 2 * tensor for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(doubled, file)
    sign(path)
    again = sparse_ft.train(
        ["mood"], from_checkpoint=path, output=tmp_path / "second", device="cpu", overrides=settings(**still)
    )
    head = sparse_ft.load(again.path, device="cpu").checkpoint.model.head("mood")
    torch.testing.assert_close(head.state_dict(), doubled, rtol=0, atol=1e-6)
