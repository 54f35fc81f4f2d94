"""Policies whose play becomes logs."""


class PolicyError(ValueError):
    """A policy cannot be used; the message names the file or name, the field and the remedy."""
