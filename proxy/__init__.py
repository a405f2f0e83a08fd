"""Services to IPVS. Empty until the proxy is built; the package name is reserved here."""
