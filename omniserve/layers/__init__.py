"""Floor 5: the parts of a decoder layer."""
