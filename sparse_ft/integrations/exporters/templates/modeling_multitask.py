"""BertForTokenClassification that answers several tasks in one pass, by a head on the text or on each token.

Written by sparse-ft. `classifier` holds the heads of all tasks, one below the other.
"""

import torch
from torch.nn import functional

from .modeling_pooled import HEAD, pool
from .modeling_shaped import ShapedConfig, ShapedForTokenClassification

TASKS = {"mood": ("text", 0, 2)}
"""Task to what its head reads, the pooled `text` or each `word`, and to its rows of the classifier."""


class MultitaskConfig(ShapedConfig):
    model_type = "multitask_bert"


class MultitaskForTasks(ShapedForTokenClassification):
    config_class = MultitaskConfig

    def forward(self, input_ids, attention_mask=None, word_shapes=None, **inputs):
        """Return the logits of each task: [rows, labels], or [rows, tokens, tags]."""
        self.added = self.word_shapes(torch.zeros_like(input_ids) if word_shapes is None else word_shapes)
        tokens = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state.float()
        mask = torch.ones_like(tokens[..., 0]) if attention_mask is None else attention_mask.to(tokens.dtype)
        states, head = {"text": pool(tokens, mask), "word": tokens}, getattr(self, HEAD)
        return {
            task: functional.linear(states[level].to(head.weight.dtype), head.weight[start:end], head.bias[start:end])
            for task, (level, start, end) in TASKS.items()
        }
