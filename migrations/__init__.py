"""Alembic migrations; the only thing that creates tables."""
