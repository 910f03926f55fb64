"""Floor 6: the one decoder, and the families that describe themselves to it."""
