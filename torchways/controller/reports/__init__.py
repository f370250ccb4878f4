"""`program.report()`: what a program's recent calls took, and what its plan says they need.

`items.py` has what a report consists of, `planned.py` reads a program's plan and `measured.py` the spans of its calls,
`loops.py` compares microbatches with their schedule, `report.py` puts all of it together, and `tables.py` and `html.py`
show it.
"""
