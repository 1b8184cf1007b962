"""Write pruned models for engines that do not run transformers.

Open llama_cpp.py first.
"""
