"""Word shapes: what they tell apart, and that they change only the expert that looks at them."""

import shutil

import pytest
import torch
from tiny_backbones import HIDDEN
from toy_checkpoints import saved, sign
from toys import run, write_toy

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.words import SHAPES, word_shape
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import CheckpointError
from sparse_ft.experts.named_experts import Expert
from sparse_ft.experts.routing import Routing


@pytest.mark.parametrize(("word", "shape"), [
    ("12", "number"), ("3.5", "number"), ("1996-08-22", "number"), ("!", "punctuation"), ("…", "punctuation"),
    ("😀", "punctuation"), ("B2B", "code"), ("5km", "code"), ("house", "lower"), ("e.g.", "lower"), ("上", "lower"),
    ("NATO", "upper"), ("U.S.", "upper"), ("AT&T", "upper"), ("A", "letter"), ("J.", "letter"), ("London", "title"),
    ("Élan", "title"), ("Mother-in-law", "title"), ("McDonald", "mixed"), ("iPhone", "mixed"), ("O'Neil", "mixed"),
    ("Jean-Paul", "mixed"), ("", "punctuation"),
])  # fmt: skip
def test_the_shape_of_a_word(word, shape):
    assert SHAPES[word_shape(word)] == shape


def test_every_piece_of_a_word_has_its_shape_and_special_tokens_none(tiny_bert):
    backbone = load_backbone(str(tiny_bert))
    (example,) = Encoder(backbone, max_length=64).words([["Lovelace", "wrote", "3.5", "programs"]])
    encoded = backbone.tokenizer([["Lovelace", "wrote", "3.5", "programs"]], is_split_into_words=True)
    names = ["title", "lower", "number", "lower"]
    expected = ["none" if word is None else names[word] for word in encoded.word_ids(0)]
    assert [SHAPES[shape] for shape in example.word_shapes] == expected


def test_windows_carry_the_shapes_of_their_words(tiny_bert):
    words = ["London", "the", "NATO", "7"] * 12
    examples = Encoder(load_backbone(str(tiny_bert)), max_length=24).words([words])
    assert len(examples) > 1
    for example in examples:
        for position, word in zip(example.word_positions, example.word_indices, strict=True):
            assert SHAPES[example.word_shapes[position]] == ("title", "lower", "upper", "number")[word % 4]


CASED = [["boring", "people", "met", "LONDON"], ["boring", "people", "met", "London"]]


@pytest.fixture(scope="module")
def shaped(tmp_path_factory, make_model):
    """A checkpoint with a tagger that sees shapes and begins at block 2, and classifiers that do not."""
    return saved(tmp_path_factory.mktemp("shaped"), make_model, "bert")


def test_taggers_on_an_uncased_backbone_see_case(shaped):
    assert load_checkpoint(shaped).model.backbone.drops_case
    model = sparse_ft.load(shaped)
    upper, title = model.logits([" ".join(words) for words in CASED], "names")
    assert not torch.equal(upper, title)
    upper, title = model.logits([" ".join(words) for words in CASED], "mood")
    torch.testing.assert_close(upper, title)


def test_shapes_are_added_where_the_expert_begins(shaped):
    model = load_checkpoint(shaped).model
    (example,) = Encoder(model.backbone, max_length=64).words([CASED[1]])
    table = model.word_shapes.tables[model.experts.index("names")]
    assert float(table[1:].abs().max()) > 0
    inputs = {"input_ids": torch.tensor([example.input_ids]), "output_hidden_states": True}
    seen = []
    block = model.backbone.blocks[2]
    with torch.no_grad():
        handle = block.attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        model(collate([("names", example)], pad_id=0))
        handle.remove()
        with model.slot.filled(Routing.one_hot([model.experts.index("names")])):
            plain = model.encoder(**inputs).hidden_states[2]
    rows = torch.tensor([example.word_shapes])
    expected = plain + torch.where((rows > 0).unsqueeze(-1), table[rows], torch.zeros(()))
    torch.testing.assert_close(seen[0], expected)


def test_special_tokens_get_nothing_even_if_their_row_is_not_zero(shaped):
    model = load_checkpoint(shaped).model
    index = model.experts.index("names")
    hidden, routing = torch.zeros(1, 3, HIDDEN), Routing.one_hot([index])
    before = model.word_shapes.added(hidden, torch.tensor([[0, 7, 0]]), routing=routing, experts=[index])
    with torch.no_grad():
        model.word_shapes.tables[index][0] += 5.0
    after = model.word_shapes.added(hidden, torch.tensor([[0, 7, 0]]), routing=routing, experts=[index])
    assert torch.equal(before, after)
    assert before[0, 1].abs().max() > 0


def test_another_expert_below_changes_nothing(shaped):
    """An expert keeps the block where its vectors are added, also if a new one begins further down."""
    checkpoint = load_checkpoint(shaped)
    texts = [" ".join(words) for words in CASED]
    model = sparse_ft.load(shaped)
    before = model.logits(texts, "names")
    checkpoint = model.checkpoint
    checkpoint.model.experts.remove("mood")  # which begins at block 0
    assert checkpoint.model.first_block == 1
    modules = checkpoint.model.backbone.select_linears(first_block=0)
    checkpoint.model.experts.create("low", modules=modules, rank=2, alpha=2.0, seed=0, word_shapes=True)
    assert checkpoint.model.first_block == 0
    for left, right in zip(before, model.logits(texts, "names"), strict=True):
        assert torch.equal(left, right)
    checkpoint.model.experts.remove("about")
    for left, right in zip(before, model.logits(texts, "names"), strict=True):
        assert torch.equal(left, right)


def test_word_shapes_can_be_switched_off(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "names", sizes=(16, 8, 8))
    path = run([task], tiny_bert, tmp_path / "out", train__epochs=1, experts__word_shapes=False).path
    assert not list(path.rglob("word_shapes.safetensors"))
    assert load_checkpoint(path).model.experts.get("names").word_shapes is None


def test_a_table_of_another_size_is_refused(shaped):
    model = load_checkpoint(shaped).model
    other = Expert("other", 1.0, {}, torch.zeros(3, HIDDEN))
    with pytest.raises(CheckpointError, match=r"Expert 'other' has word shapes \(3, 32\), expected \(9, 32\)"):
        model.experts.add(other)


def test_a_lost_table_is_noticed(shaped, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shaped, copy)
    (copy / "experts/names/word_shapes.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"word_shapes\.safetensors is missing"):
        load_checkpoint(copy)
    assert load_checkpoint(sign(copy)).model.experts.get("names").word_shapes is None
