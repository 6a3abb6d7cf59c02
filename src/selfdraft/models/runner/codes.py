"""The codes of glue instructions, as kernels/glue.h has them."""

COPY, NEG, EXP, RSQRT, SQRT, TANH, SIGMOID, SILU, GELU, GELU_TANH, RELU = range(11)
COS, SIN, ABS, SQUARE, RECIPROCAL, CUBE = range(11, 17)
"""Pointwise instructions of one operand."""
ADD, SUB, MUL, DIV, POW, MAXIMUM, MINIMUM = range(32, 39)
"""Those of two."""
SUM, MEAN, AMAX = range(64, 67)
LAYER_NORM, RMS_NORM, EMBED, PICK, GATED, GLU, ROTARY = range(80, 87)
