"""Find the units of a model that can be removed exactly, and prove it.

Open discovery.py first.
"""
