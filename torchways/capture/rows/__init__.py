"""Rows of unknown number in graphs whose shapes are known: what masks and computed bounds select.

`values.py` says what such rows are, `rules.py` what operators make of them, `loops.py` what a Python loop over them
does. `windows.py` has those between computed bounds. Nothing here knows how a graph is recorded: all that these modules
ask of a trace is the node of a tensor.
"""
