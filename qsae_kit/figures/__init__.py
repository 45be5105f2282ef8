"""Tables become figures; no model in sight."""
