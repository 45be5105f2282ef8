"""What third parties test their own SAEs with: the contract of an architecture, as checks."""
