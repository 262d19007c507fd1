"""Classes that the package stands in for: written twins, and the real ones where these are installed."""
