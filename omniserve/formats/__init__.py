"""Floor 2: what the bytes of weights, pages and checkpoints mean."""
