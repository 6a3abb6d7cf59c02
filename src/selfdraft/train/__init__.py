"""Training of mask tokens and their gated adapter, for the drafters s3d and space."""
