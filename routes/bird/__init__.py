"""BIRD 2: its configuration out of a plan, its control socket, and what it says."""
