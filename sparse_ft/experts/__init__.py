"""The expert layer, named experts, heads, gates, and the model that runs a batch through them."""
