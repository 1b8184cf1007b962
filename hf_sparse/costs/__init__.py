"""Tell what each unit costs: in parameters, multiply-accumulates, milliseconds, bytes.

Open table.py first.
"""
