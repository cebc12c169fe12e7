"""Live objects to documents and back; the only layer that knows torch."""
