"""What a GPU's numbers are worth: memory, compute, other types, the prefill chunk."""
