"""Data and models for runs without flags, made from what is installed; begin with docstrings.py."""
