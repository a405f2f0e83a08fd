"""Floor 1: clock, tasks and runners on asyncio; no domain."""
