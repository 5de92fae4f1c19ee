"""Cross-attention from text to packed visual tokens, one interval of visual tokens for each text token."""
