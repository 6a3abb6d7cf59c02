"""The codes of glue instructions, as kernels/glue.h has them."""

COPY, NEG, RSQRT, SQRT, SILU, GELU, GELU_TANH, COS, SIN = 0, 1, 3, 4, 7, 8, 9, 11, 12
SQUARE, CUBE = 14, 16
ADD, MUL, POW, MAXIMUM, MINIMUM = 32, 34, 36, 37, 38
"""Pointwise instructions of one operand, then of two."""
SUM, MEAN = 64, 65
LAYER_NORM, RMS_NORM, EMBED, PICK, GATED, GLU, ROTARY = range(80, 87)
