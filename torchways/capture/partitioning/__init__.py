"""From a pure graph to a dataflow program: operators get slices, and become compiled functions.

Start with `partition.py`. The steps are `placement.py`, `cutting.py`, `seeds.py`, `shardings.py` and `emission.py`;
`placed_graph.py` is the graph that they share. Nothing here knows how it was traced, or what will run the program.
"""
