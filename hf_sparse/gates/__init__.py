"""Put differentiable gates on units and drive them to zero.

Open mathematics.py first.
"""
