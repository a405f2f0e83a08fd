"""Root: a cluster on one machine out of network namespaces."""
