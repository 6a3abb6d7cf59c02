"""The three runs of `recipes/gpu.py` on a machine with one GPU, and the table that is made of their figures."""
