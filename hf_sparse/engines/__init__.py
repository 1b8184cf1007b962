"""Shard, gather and change a model under DDP, FSDP2 and DeepSpeed.

Open sharding.py first.
"""
