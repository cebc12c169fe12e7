"""The verbs; joins loader, storage and registry."""
