"""Exit codes of every command; 3 is a server whose engine has ended."""

OK, INTERNAL, USAGE, GATE, INTERRUPTED = 0, 1, 2, 4, 130
"""GATE: a measurement did not pass the limit that was given. A command may return one itself."""
