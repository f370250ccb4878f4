"""The one kind of link between two of our processes: authenticated, framed TCP connections.

It knows nothing of what its frames carry.
"""
