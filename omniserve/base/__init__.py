"""Floor 0: the words of the house. No torch, no input or output but the log."""
