"""Pure rules: the tree, the rows, the choice, the walk, the commit. Torch only.

No I/O, no clock, no environment, no global.
"""
