"""Let the model learn from a teacher while it gets smaller.

Open distiller.py first.
"""
