"""Root: the command netpol-ctl."""
