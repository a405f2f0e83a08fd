"""Floor 2: the only netlink, iptables and /proc."""
