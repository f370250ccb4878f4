"""Takes operators apart when they are captured, because torch-xla has no lowering for them, or a wrong one.

`decompositions.py` has the table of all of them; there is a module for each family of operators. `kept_whole.py` lists
those that PyTorch would take apart and torch-xla lowers right. Nothing here knows the function that is traced.
"""
