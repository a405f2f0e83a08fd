"""Pure: desired ipsets and iptables chains from the calculation graph."""
