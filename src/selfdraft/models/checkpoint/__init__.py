"""A checkpoint on disk or on the hub: found, read, and refused when it is not whole. No target is made here."""
