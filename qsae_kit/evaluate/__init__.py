"""Suites and tokens become tables."""
