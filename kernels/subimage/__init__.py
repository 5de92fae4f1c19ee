"""Self-attention of a vision tower, batched over sub-images (tiles)."""
