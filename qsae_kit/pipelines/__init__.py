"""Everything in one folder by one command."""
