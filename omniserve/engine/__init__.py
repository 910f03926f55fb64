"""Floor 7: requests become steps, steps become tokens."""
