"""Remove the units whose gates reached zero, and prove that the outputs stay.

Open compact.py first.
"""
