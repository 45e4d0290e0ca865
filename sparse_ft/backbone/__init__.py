"""What is the same for every task: the pretrained model, its tokenizer, batches and devices."""
