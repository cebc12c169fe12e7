"""Bytes by key: stores, packs, chunks, headers. Knows neither torch nor SQL."""
