"""Passes of fixed shape over fixed memory, which a CUDA graph can hold: see docs/decisions/012-fixed-shapes.md."""
