"""Rows become SAEs; sees a row source, never a model (`fit` alone does)."""
