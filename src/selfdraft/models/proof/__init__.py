"""The proof at load: that a target computes what the stock model computes, and what was proved before."""
