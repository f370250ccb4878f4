"""From a pure graph to a dataflow program: each operator gets a slice, and each slice's operators become compiled
functions.

`partition.py` is the way in. Nothing here knows how the graph was traced, or what will run the program.
"""
