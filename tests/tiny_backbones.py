"""Tiny randomly initialised backbones of every family, built here and saved as a user would have them on disk.

Their weights are random: they prove code paths, never quality.
"""

from pathlib import Path

import torch

FAMILIES = (
    "bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "gpt2", "gpt_neox", "llama", "qwen2",
)  # fmt: skip


CAUSAL = ("gpt2", "gpt_neox", "llama", "qwen2")


HIDDEN = 32


BLOCKS = 3


POSITIONS = 96


_CORPUS = [
    "The quick brown fox jumps over the lazy dog. Book a table for two in Lisbon tomorrow at 7.30 pm, please!",
    "Ada Lovelace wrote the first program; Charles Babbage designed the analytical engine in London.",
    "I really loved this film, but the second half was boring and much too long. What a terrible waste of money.",
    "The United Nations met in Geneva on 1996-08-22 to discuss trade, football and the weather.",
    "Shares of Acme Corp. fell 3.5 per cent after the company said that profits would be lower than expected.",
    "Who won the match between Arsenal and Chelsea? Play some music by Mozart, then wake me up at six.",
]


_CHINESE = "我们在上海住了三年北京的天气很好"


def save_tiny(folder: Path, family: str, *, bos: bool | None = None, seed: int = 0) -> None:
    """Save a model of three blocks and a tokenizer with a few hundred entries."""
    from transformers import AutoModel

    tokenizer = _tokenizer(family, bos=bos)
    tokenizer.save_pretrained(folder)
    config = _config(family, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config)
    model.save_pretrained(folder)


def _config(family, tokenizer):
    from transformers import AutoConfig

    # 0.2 instead of 0.02: with hidden size 32 the blocks would else hardly change what passes through them.
    shared = {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    shared |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shared |= {"pad_token_id": tokenizer.pad_token_id}
    bert = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS,
    }
    own = {
        "bert": bert,
        # RoBERTa's positions begin at pad_token_id + 1.
        "roberta": {**bert, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1},
        # A projection between embeddings and blocks, which is a linear outside the blocks.
        "electra": {**bert, "embedding_size": 16},
        "distilbert": {
            "dim": HIDDEN,
            "n_layers": BLOCKS,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": POSITIONS,
        },
        # As microsoft/deberta-v3 has it: relative positions projected by the same linears as the text.
        "deberta-v2": {
            **bert,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "max_relative_positions": -1,
        },
        "modernbert": {
            **bert,
            "global_attn_every_n_layers": 2,
            "local_attention": 16,
            "cls_token_id": tokenizer.cls_token_id,
            "sep_token_id": tokenizer.sep_token_id,
        },
        "gpt2": {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_inner": 48, "n_positions": POSITIONS},
        "gpt_neox": bert,
        "llama": {**bert, "num_key_value_heads": 2},
        "qwen2": {**bert, "num_key_value_heads": 2},
    }[family]
    return AutoConfig.for_model(family, **(shared | own))


def _tokenizer(family, *, bos):
    if family in ("bert", "distilbert", "electra"):
        return _word_pieces(has_types=family != "distilbert")
    if family == "deberta-v2":
        return _unigram()
    if family == "llama":
        return _metaspace_bpe(bos=bos is not False)
    return _byte_level(family, bos=bool(bos))


def _train(tokenizer, trainer):
    tokenizer.train_from_iterator([*_CORPUS, *_CHINESE], trainer)
    return tokenizer


def _pieces(number, *, pre_tokenizer, normalizer=None):
    """Return pieces of words by BPE: its trainer gives the same in every process, WordPiece's and Unigram's do not."""
    from tokenizers import Tokenizer, models, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        raw.normalizer = normalizer
    vocabulary = _train(raw, trainers.BpeTrainer(vocab_size=number, show_progress=False)).get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def _word_pieces(*, has_types):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    pieces = _pieces(147, pre_tokenizer=pre_tokenizer, normalizer=normalizer)
    tokens = [*special, *pieces, *(f"##{piece}" for piece in pieces)]
    raw = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizer, pre_tokenizer
    raw.decoder = decoders.WordPiece()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if has_types else ["input_ids", "attention_mask"]
    return BertTokenizerFast(tokenizer_object=raw, model_max_length=POSITIONS, model_input_names=inputs)


def _unigram():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import DebertaV2TokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    pieces = _pieces(295, pre_tokenizer=pre_tokenizers.Metaspace())
    scores = [(token, 0.0) for token in special] + [(piece, -10 - rank / 1000) for rank, piece in enumerate(pieces)]
    raw = Tokenizer(models.Unigram(scores, unk_id=special.index("[UNK]")))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return DebertaV2TokenizerFast(tokenizer_object=raw)


def _metaspace_bpe(*, bos):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    _train(raw, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _byte_level(family, *, bos):
    """GPT-2, NeoX and Qwen2 without special tokens (nor, but for Qwen2, a pad token); RoBERTa and ModernBERT with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import (
        GPT2TokenizerFast,
        GPTNeoXTokenizerFast,
        PreTrainedTokenizerFast,
        Qwen2TokenizerFast,
        RobertaTokenizerFast,
    )

    names = {
        "roberta": {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"},
        "modernbert": {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"},
        "qwen2": {"pad": "<|endoftext|>", "eos": "<|im_end|>"},
    }.get(family, {"eos": "<|endoftext|>"})
    special = list(names.values())
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(
        raw, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokens = {f"{name}_token": token for name, token in names.items()}
    if family == "roberta":
        raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        tokens |= {"cls_token": "<s>", "sep_token": "</s>"}
        return RobertaTokenizerFast(tokenizer_object=raw, **tokens)
    if family == "modernbert":
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=raw, **tokens)
    if bos:
        eos = names["eos"]
        raw.post_processor = processors.TemplateProcessing(
            single=f"{eos} $A", pair=f"{eos} $A {eos} $B", special_tokens=[(eos, special.index(eos))]
        )
    tokens["bos_token"] = names["eos"]
    if family == "qwen2":
        return Qwen2TokenizerFast(tokenizer_object=raw, **tokens)
    own = GPT2TokenizerFast if family == "gpt2" else GPTNeoXTokenizerFast
    return own(tokenizer_object=raw, unk_token=names["eos"], pad_token=None, **tokens)
