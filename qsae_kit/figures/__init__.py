"""Tables become figures, both become pages; no model in sight."""
