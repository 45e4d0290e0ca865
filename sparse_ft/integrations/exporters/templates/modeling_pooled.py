"""BertForTokenClassification with one answer for each text: its head reads the pooled tokens.

Written by sparse-ft.
"""

import torch
from transformers import BertConfig, BertForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutput

POOLING = "unit"
"""The `first` or the `last` token, the `mean` of all, or `unit`, the mean scaled to one length."""
HEAD = "classifier"
EPSILON = 1e-6


class PooledConfig(BertConfig):
    # A type of its own, so that no stock class takes these weights for its own.
    model_type = "pooled_bert"


class PooledForSequenceClassification(BertForTokenClassification):
    config_class = PooledConfig

    def __init__(self, config):
        super().__init__(BertConfig.from_dict(config.to_dict()))  # the type by which the library builds the backbone
        self.config = config

    def forward(self, input_ids, attention_mask=None, **inputs):
        tokens = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state.float()
        mask = torch.ones_like(tokens[..., 0]) if attention_mask is None else attention_mask.to(tokens.dtype)
        head = getattr(self, HEAD)
        return SequenceClassifierOutput(logits=head(pool(tokens, mask).to(head.weight.dtype)))


def pool(tokens, mask):
    if POOLING == "first":
        return tokens[:, 0]
    if POOLING == "last":
        return tokens[torch.arange(len(mask), device=mask.device), (mask.cumsum(1) * mask).argmax(1)]
    mean = (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return mean * (mean.square().mean(-1, keepdim=True) + EPSILON).rsqrt() if POOLING == "unit" else mean
