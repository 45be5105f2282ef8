"""Parses, calls, prints."""
