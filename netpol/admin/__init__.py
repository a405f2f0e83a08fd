"""Room: the agent's unix-socket protocol, server and client."""
