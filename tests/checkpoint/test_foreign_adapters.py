"""LoRA adapters that PEFT wrote, against PEFT itself."""

import json

import pytest
import safetensors.torch
import torch
from tiny_backbones import BLOCKS
from toy_checkpoints import all_logits, assert_bit_identical, saved, wrap

from sparse_ft.backbone.backbone import load_backbone, set_attention
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.checkpoint.foreign_adapters import read_adapter
from sparse_ft.cli.listing import describe_checkpoint
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.merging.add import add_from
from sparse_ft.merging.edit import edit

TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "down_proj"]}
INPUTS = {"input_ids": torch.tensor([[2, 11, 12, 13, 14, 3], [2, 20, 21, 22, 23, 3]])}
HEADS = {"mood": ("text", 2), "names": ("word", 5)}


def hidden_states(encoder):
    """What the blocks give, before any head."""
    with torch.no_grad():
        return encoder(**INPUTS).last_hidden_state


def encoder_of(peft_model):
    return peft_model.base_model.model.base_model


def our_hidden_states(folder, adapter):
    model = SparseExpertModel(load_backbone(str(folder)))
    set_attention(model.backbone, "eager")
    model.experts.add(read_adapter(adapter, name="x", backbone=model.backbone).expert)
    with model.slot.filled(Routing.one_hot([0, 0])):
        return hidden_states(model.encoder)


ALL = {"use_rslora": True, "rank_pattern": {r"1\..*first": 7, "second": 3},
       "alpha_pattern": {r"[02]\..*first": 5, "second": 1}}  # fmt: skip


@pytest.mark.parametrize(("family", "settings"), [
    pytest.param("bert", {}, id="plain"),
    pytest.param("bert", {"use_rslora": True}, id="rslora"),
    pytest.param("bert", {"rank_pattern": {"first": 2}}, id="ranks"),
    pytest.param("bert", {"alpha_pattern": {"second": 3}}, id="alphas"),
    pytest.param("bert", ALL, id="all of it"),
    pytest.param("gpt2", ALL, id="all of it on Conv1D"),
])  # fmt: skip
def test_an_adapter_of_a_classifier_gives_the_hidden_states_of_peft(tmp_path, tiny_folder, family, settings):
    folder, (first, second) = tiny_folder(family), TARGETS[family]
    named = {
        key: {pattern.replace("first", first).replace("second", second): number for pattern, number in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in settings.items()
    }
    theirs = wrap(folder, r=4, lora_alpha=9, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2", **named)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = hidden_states(encoder_of(theirs))
    torch.testing.assert_close(our_hidden_states(folder, tmp_path / "adapter"), expected, atol=1e-5, rtol=1e-5)
    with theirs.disable_adapter():
        assert (hidden_states(encoder_of(theirs)) - expected).abs().max() > 0.05


@pytest.mark.parametrize(("family", "auto", "task_type"), [
    ("bert", "AutoModel", "FEATURE_EXTRACTION"),
    ("bert", "AutoModelForTokenClassification", "TOKEN_CLS"),
    ("bert", "AutoModelForMaskedLM", None),
    ("deberta-v2", "AutoModelForSequenceClassification", "SEQ_CLS"),
    ("gpt2", "AutoModelForCausalLM", "CAUSAL_LM"),
])  # fmt: skip
def test_what_stands_before_the_block_stack_is_stripped(tmp_path, tiny_folder, family, auto, task_type):
    folder = tiny_folder(family)
    backbone = load_backbone(str(folder))
    ending = next(iter(backbone.linears)).rpartition(".")[2]
    wrap(folder, auto=auto, task_type=task_type, r=2, target_modules=[ending]).save_pretrained(tmp_path / "adapter")
    imported = read_adapter(tmp_path / "adapter", name="x", backbone=backbone)
    assert list(imported.expert.deltas) == sorted(name for name in backbone.linears if name.endswith(f".{ending}"))
    assert len(imported.expert.deltas) >= BLOCKS
    head = task_type in ("SEQ_CLS", "TOKEN_CLS")
    assert bool(imported.notes) == head
    if head:
        assert imported.notes[0].startswith("Not imported, because it stands behind the blocks (a head or pooler): ")


def test_head_and_pooler_are_left_out_and_said(tmp_path, tiny_bert):
    theirs = wrap(tiny_bert, r=4, target_modules="all-linear")
    theirs.save_pretrained(tmp_path / "adapter")
    imported = read_adapter(tmp_path / "adapter", name="x", backbone=load_backbone(str(tiny_bert)))
    (note,) = imported.notes
    assert note.endswith("(a head or pooler): classifier, bert.pooler.dense.")
    expected = hidden_states(encoder_of(theirs))
    torch.testing.assert_close(our_hidden_states(tiny_bert, tmp_path / "adapter"), expected, atol=1e-5, rtol=1e-5)


def test_another_name_of_the_backbone_is_said(tmp_path, tiny_folder):
    wrap(tiny_folder("bert", seed=1), r=2, target_modules=["query"]).save_pretrained(tmp_path / "adapter")
    imported = read_adapter(tmp_path / "adapter", name="x", backbone=load_backbone(str(tiny_folder("bert"))))
    assert f"It names the backbone {str(tiny_folder('bert', seed=1))!r}, this one is" in imported.notes[-1]
    assert imported.notes[-1].endswith("only the shapes could be compared.")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_an_added_adapter_has_no_task_and_no_other_task_notices(tmp_path, tiny_folder, make_model, family):
    path = saved(tmp_path / "first", make_model, family, heads=HEADS)
    before = all_logits(load_checkpoint(path).model, list(HEADS))
    adapter = tmp_path / "adapter.v1"
    wrap(tiny_folder(family), r=4, target_modules=TARGETS[family][:1]).save_pretrained(adapter)
    with pytest.raises(
        ConfigError, match=rf"name 'adapter\.v1' is not allowed: .* Choose one with --add NAME={adapter}"
    ):
        edit(path, add=[(None, adapter)], output=tmp_path / "out")
    result = edit(path, add=[("theirs", adapter)], output=tmp_path / "out")
    assert result.changes[0] == (
        f"Added 'theirs' from {str(adapter)!r}: rank 4 on 3 layers. It has no head, so no task "
        "(`sparse-ft import` reads those of token classifiers)."
    )
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.model.experts.names == ["mood", "names", "theirs"]
    assert list(loaded.tasks) == list(HEADS)
    assert_bit_identical(before, all_logits(loaded.model, list(HEADS)))
    imported = read_adapter(adapter, name="theirs", backbone=loaded.model.backbone).expert
    again = loaded.model.experts.get("theirs")
    assert again.alpha == imported.alpha
    for module, pair in imported.deltas.items():
        assert all(torch.equal(*both) for both in zip(pair, again.deltas[module], strict=True))
    (row,) = [line for line in describe_checkpoint(tmp_path / "out").splitlines() if line.startswith("theirs ")]
    assert row.split()[-1] == "none"
    pruned = edit(tmp_path / "out", prune=[("theirs", 2)], output=tmp_path / "pruned")
    assert pruned.changes[0].startswith("Pruned expert 'theirs' to rank 2.")


def test_half_precision_is_read(tmp_path, tiny_bert):
    wrap(tiny_bert, r=2, target_modules=["query"]).to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    expert = read_adapter(tmp_path / "adapter", name="x", backbone=load_backbone(str(tiny_bert))).expert
    assert {tensor.dtype for pair in expert.deltas.values() for tensor in pair} == {torch.float32}


# What is refused, and in which words


@pytest.fixture
def adapter(tmp_path, tiny_bert):
    """An adapter that a test may damage."""
    wrap(tiny_bert, r=2, lora_alpha=4, target_modules=["query"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(adapter, backbone_folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_adapter(adapter, name="x", backbone=load_backbone(str(backbone_folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"peft_type": "IA3"}, "is of type 'IA3'. Expected 'LORA'"),
    ({"peft_type": None}, "is of type None. Expected 'LORA'"),
    ({"use_dora": True}, "has use_dora=True: DoRA also rescales the frozen weight. Only plain LoRA becomes an expert"),
    ({"bias": "lora_only"}, "has bias='lora_only': it changes biases of the backbone"),
    ({"lora_bias": True}, "has lora_bias=True: it adds a bias to B"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "has layer_replication=[[0, 2], [1, 3]]: it repeats blocks"),
    ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights='pissa_niter_4', which changed the weights of its"),
    ({"r": 3}, "has rank 2 in 'bert.encoder.layer.0.attention.self.query', but its adapter_config.json says 3."),
    ({"r": None}, "is damaged: r: Input should be a valid integer"),
    ({"r": 2.5}, "is damaged: r: Input should be a valid integer"),
    *[({"lora_alpha": value}, "is damaged: lora_alpha: Input should be ")
      for value in (0, -4, 1e300, "4", None)],
    *[({"lora_alpha": value}, " is no JSON value") for value in (float("nan"), float("inf"))],
    ({"alpha_pattern": {"query": -1}}, "is damaged: alpha_pattern.query: Input should be greater than 0"),
    ({"alpha_pattern": 3}, "is damaged: alpha_pattern: Input should be a valid dictionary"),
    ({"alpha_pattern": {"(": 3}}, "no regular expression: missing )"),
    ({"rank_pattern": {"(a+)+$": 3}}, "without repeated groups"),
    ({"base_model_name_or_path": 5}, "base_model_name_or_path: Input should be a valid string"),
    ({"use_new_trick": 2}, "has use_new_trick=2, which this version does not know"),
])  # fmt: skip
def test_what_is_no_plain_lora_is_refused(adapter, tiny_bert, changes, message):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert message in refused(adapter, tiny_bert)


def test_a_dora_of_peft_is_refused(tmp_path, tiny_bert):
    wrap(tiny_bert, r=2, target_modules=["query"], use_dora=True).save_pretrained(tmp_path / "adapter")
    assert "DoRA" in refused(tmp_path / "adapter", tiny_bert)


@pytest.mark.parametrize("targets", [["word_embeddings", "query"], ["query", "position_embeddings"]])
def test_changed_embeddings_are_refused(tmp_path, tiny_bert, targets):
    wrap(tiny_bert, r=2, target_modules=targets).save_pretrained(tmp_path / "adapter")
    message = refused(tmp_path / "adapter", tiny_bert)
    assert "changes 'bert.embeddings." in message
    assert "changes what all experts share" in message


def test_a_saved_module_of_the_backbone_is_refused(tmp_path, tiny_bert):
    theirs = wrap(tiny_bert, r=2, target_modules=["query"], modules_to_save=["classifier", "LayerNorm"])
    theirs.save_pretrained(tmp_path / "adapter")
    assert "LayerNorm" in refused(tmp_path / "adapter", tiny_bert)


def test_another_backbone_is_refused(adapter, tiny_folder, tmp_path):
    assert "changes no linear in the blocks of this backbone" in refused(adapter, tiny_folder("gpt2"))
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    BertModel(config).save_pretrained(tmp_path / "short")
    load_backbone(str(tiny_folder("bert"))).tokenizer.save_pretrained(tmp_path / "short")
    message = refused(adapter, tmp_path / "short")
    assert "changes 'bert.encoder.layer.1.attention.self.query', which is no linear in the 1 blocks" in message


def test_another_width_is_refused(adapter, make_model, tmp_path):
    path = saved(tmp_path / "first", make_model, "bert", heads=HEADS)
    file = adapter / "adapter_model.safetensors"
    wide = {name: torch.randn(2, 64) if "lora_A" in name else tensor
            for name, tensor in safetensors.torch.load_file(file).items()}  # fmt: skip
    safetensors.torch.save_file(wide, file)
    loaded = load_checkpoint(path)
    before = all_logits(loaded.model, list(HEADS))
    with pytest.raises(CheckpointError, match=r"'x' has A \(2, 64\) and B \(32, 2\) for the layer .* of 32 inputs"):
        add_from(loaded, adapter, as_name="x")
    assert_bit_identical(before, all_logits(loaded.model, list(HEADS)))


def test_damaged_weights_are_refused(adapter, tiny_bert):
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    safetensors.torch.save_file({**tensors, name: tensors[name] * float("nan")}, file)
    assert f"holds NaN or infinite numbers in {name!r}" in refused(adapter, tiny_bert)
    safetensors.torch.save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    assert "it has A of 'bert.encoder.layer.0.attention.self.query' but not B" in refused(adapter, tiny_bert)
    file.rename(adapter / "adapter_model.bin")
    assert "has no adapter_model.safetensors. Pickled weights (.bin) are not read" in refused(adapter, tiny_bert)
    (adapter / "adapter_config.json").write_text("[1")
    assert "adapter_config.json' is damaged" in refused(adapter, tiny_bert)
