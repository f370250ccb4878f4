"""How a trace reads, writes and depends on Python's state: the one place that knows.

While a function is traced, a `Watcher` notes each *place* of Python's state (an attribute, an item, a variable of a
closure, a gradient) that is read, with what was there. What was read is a condition of the trace or, for tensors and
for numbers that change, an input that each call binds anew. What was written is a result that each run writes back.
"""
