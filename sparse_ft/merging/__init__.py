"""New checkpoints of old ones: edit, split, prune and merge."""
