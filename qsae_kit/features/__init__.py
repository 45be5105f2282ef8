"""Suites and documents become an index to look things up in."""
