"""Measure what came of a run, and draw it.

Open report.py first.
"""
