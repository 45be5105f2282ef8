"""Bytes appear whole or not at all, and a run that was cut off goes on or refuses."""
