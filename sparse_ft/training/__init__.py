"""From a run's config to a checkpoint: experts, heads and gates are trained here."""
