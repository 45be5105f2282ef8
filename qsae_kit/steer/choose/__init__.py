"""Features out of a difference: what tells two groups of tokens apart, and sets of features that
real passes confirm.
"""
