"""Functions of PyTorch's Python library that run in another form while a trace is under way.

They decide by values, write behind the tracer's back, or call operators without a lowering. Here each gets a form that
can be traced and gives the same numbers, or is refused by name; `modes.py` switches most of them on. Nothing here knows
the graph: what replaces single operators of it is in `lowering/`.
"""
