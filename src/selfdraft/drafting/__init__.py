"""What drafters are made of: estimators, cost model, sources of candidates, token trees. Imports core only.

No I/O, no clock of its own (clocks are arguments), no environment, no global state.
"""
