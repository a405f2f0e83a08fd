"""Room: applies desired sets and chains to the kernel."""
