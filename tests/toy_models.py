"""A model of three tasks with random experts, and what runs rows through it."""

import torch

from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Encoder

# Heads of different size and level, experts of different rank and depth.
THREE_HEADS = {"mood": ("text", 3), "names": ("word", 7), "topic": ("text", 12)}
FIRST_BLOCK = {"mood": 1, "names": 0, "topic": 2}
RANK = {"mood": 4, "names": 2, "topic": 8}
SENTENCES = [
    "Book a table for two in Lisbon",
    "Ada",
    "I really loved this film , but the second half was boring and much too long .",
    "Charles Babbage designed the engine",
]


def three_tasks(make_model, family, **settings):
    return make_model(family, THREE_HEADS, first_block=FIRST_BLOCK, rank=RANK, **settings)


def rows_of(model, task, texts=SENTENCES):
    """Encode texts as rows of a task."""
    encoder = Encoder(model.backbone, max_length=64)
    if model.tasks[task].level == "word":
        return [(task, example) for example in encoder.words([text.split() for text in texts])]
    return [(task, example) for example in encoder.texts(texts)]


def run_rows(model, rows, **options):
    """Run rows of any tasks as one batch; return the logits by task."""
    return model(collate(rows, pad_id=model.backbone.pad_id), **options)


@torch.no_grad()
def one_by_one(model, task):
    """Return the logits of each row of a task in a batch of its own, concatenated."""
    return torch.cat([run_rows(model, [row])[task] for row in rows_of(model, task)])


def assert_same_logits(logits, expected):
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
