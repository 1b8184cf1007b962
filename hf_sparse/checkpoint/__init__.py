"""Save, load, inspect and describe pruned models, and push them to the Hub.

Open save_load.py first.
"""
