"""Measures one case: clocks, memory, checks, and the record of the results."""
