"""Join everything into the Trainers that people use.

Open trainer.py first.
"""
