"""Train a model on one device or many: the same operations under DDP, FSDP2 and DeepSpeed.

Open base.py first.
"""
