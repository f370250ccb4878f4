"""How a trace reads Python's state, writes to it and depends on it.

While a function is traced, a `Watcher` notes each *place* of Python's state (an attribute, an item, a variable of a
closure, a gradient) that is read, and its value. A value that was read is a condition of the trace; tensors, and
numbers that change, are inputs that each call binds anew. A value that was written is a result that each run writes
back. Nothing here knows of graphs: a trace is a function that reads and writes.
"""
