"""Weights in blocks with scales: formats, packed layout, exact products, layers, and how float weights become them."""
