"""Pure: what NetworkPolicy objects mean (calculation graph, evaluator, explanation)."""
