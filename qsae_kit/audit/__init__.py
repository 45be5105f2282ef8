"""A model's fault: where it comes from, how it is mended in the weights, and the proof."""
