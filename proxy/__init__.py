"""Services to IPVS: a node without kube-proxy. docs/services.md says what is served, and how."""
