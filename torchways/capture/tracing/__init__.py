"""One trace of a Python function: what it calls becomes a graph without side effects.

Start with `tracer.py`, which sees every operator, and `recorder.py`, which records them. The other modules are parts of
a trace: its inputs, random numbers, values known while tracing, optimizers, and layers that repeat. `pure_graph.py`
tidies what was recorded. Nothing here knows how a graph is cut into compiled functions, or of processes.
"""
