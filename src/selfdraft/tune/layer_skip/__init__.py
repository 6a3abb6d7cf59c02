"""The search for a skip set: which sublayers a layer-skip draft leaves out."""
