"""Runs the command as `python -m hf_sparse`, which `accelerate launch -m` needs."""

from hf_sparse.cli import main

main()
