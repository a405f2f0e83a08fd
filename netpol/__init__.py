"""netpol: the network agent of a Kubernetes node, policy first."""

__version__ = "0.1.0"
