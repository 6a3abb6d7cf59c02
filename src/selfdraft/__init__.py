"""Decode several tokens per forward pass with no second model; the text is exactly what it would have been."""
