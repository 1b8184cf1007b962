"""Let a model learn from a teacher while it is pruned.

Open distiller.py first.
"""
