"""Serve all other packages: processes, files, clocks, weights that stream through a device.

Open processes.py first.
"""
