"""Floor 1: operations. One file per operation: its contract and its torch reference."""
