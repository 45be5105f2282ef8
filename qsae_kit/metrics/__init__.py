"""Tensors and counts become numbers; one name, one formula."""
