"""Floor 4: which keys are kept in memory and which are read."""
