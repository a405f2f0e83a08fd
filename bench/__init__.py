"""Benchmarks: the figures of the budget, each with what it is compared with, measured in one run."""
