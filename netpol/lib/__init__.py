"""Floor 0: pure Python that knows neither Kubernetes nor Linux."""
