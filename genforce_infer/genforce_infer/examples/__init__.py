"""Small complete clients of the live force topic."""
