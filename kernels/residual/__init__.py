"""Gate, residual and the following LayerNorm in one pass over the hidden states."""
