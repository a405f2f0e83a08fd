"""Floor 1: frozen values shared by every room; no I/O."""
