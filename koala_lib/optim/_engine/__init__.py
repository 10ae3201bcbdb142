"""How a pass over the weights runs: lists of tensors, compiled code, shards. Never what it computes."""
