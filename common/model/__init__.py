"""A config or weights -> a causal language model; its loss, its memory, its FLOPs."""
