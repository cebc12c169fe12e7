"""Facts by SQL: rows in, frozen records out."""
