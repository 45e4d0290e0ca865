"""Parts that all tasks have in common: the pretrained model, its tokenizer, batches and devices."""
