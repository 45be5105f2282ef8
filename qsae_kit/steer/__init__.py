"""Features become edits, edits answers, answers a verdict."""
