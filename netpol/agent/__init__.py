"""The composition root of the agent: `main` wires it, `report` shows it."""

from netpol.agent.main import Agent, run

__all__ = ["Agent", "run"]
