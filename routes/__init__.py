"""podCIDR routes over BGP. Empty until routes are built; the package name is reserved here."""
