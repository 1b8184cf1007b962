"""What recipes share, so that each says only what its task needs; begin with running.py."""
