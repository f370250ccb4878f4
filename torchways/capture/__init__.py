"""From a Python function of tensors to a dataflow program.

Where to look for what:

- `tracing/`: runs the function once and records what it calls as a graph.
- `python_state/`: the attributes, items and variables that the function reads and writes.
- `library/`: functions of PyTorch's library that run in another form within a trace.
- `rows/`: rows that masks and computed bounds select, whose number is unknown.
- `lowering/`: operators that are taken apart because torch-xla lacks them.
- `partitioning/`: cuts the graph into compiled functions by slice.

The modules beside these folders are small and used by several of them. Nothing here knows of processes.
"""
