"""The compiled path: a pass of a stock model, traced once and run by one call into `kernels/`."""
