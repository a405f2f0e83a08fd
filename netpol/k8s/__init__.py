"""Floor 2: the only client of the Kubernetes API."""
