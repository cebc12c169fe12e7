"""Values that every layer speaks: standard library and msgspec only."""
