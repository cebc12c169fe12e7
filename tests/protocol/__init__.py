"""Explicit-state models of the rule in ``docs/safety.md``, explored by ``test_protocol.py``."""
