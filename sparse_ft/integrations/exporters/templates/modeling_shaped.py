"""BertForTokenClassification that sees how words are written: a vector for each shape is added where a block begins.

Written by sparse-ft. The shapes come from the tokenizer of this folder.
"""

import torch
from transformers import BertConfig, BertForTokenClassification

BLOCK = "bert.encoder.layer.0"
SHAPES, WIDTH = 9, 768


class ShapedConfig(BertConfig):
    # A type of its own, so that no stock class takes these weights for its own.
    model_type = "shaped_bert"


class ShapedForTokenClassification(BertForTokenClassification):
    config_class = ShapedConfig

    def __init__(self, config):
        super().__init__(BertConfig.from_dict(config.to_dict()))  # the type by which the library builds the backbone
        self.config = config
        self.word_shapes = torch.nn.Embedding(SHAPES, WIDTH)  # row 0, of what is no word, is zero
        self.get_submodule(BLOCK).register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, block, arguments, named):
        if arguments:
            return (arguments[0] + self.added, *arguments[1:]), named
        return arguments, {**named, "hidden_states": named["hidden_states"] + self.added}

    def forward(self, input_ids, attention_mask=None, word_shapes=None, **inputs):
        if word_shapes is None:
            raise ValueError("word_shapes is missing. Load the tokenizer of this folder with trust_remote_code=True.")
        self.added = self.word_shapes(word_shapes)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **inputs)
