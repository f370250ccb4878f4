"""Rows of unknown number in graphs whose shapes are known: what masks and computed bounds select.

`rules.py` says what each operator makes of them. Nothing here knows how a graph is recorded: all that these modules ask
of a trace is the node of a tensor.
"""
