"""One folder per op: `reference.py` defines it, `op.py` is what users call, the other files are its backends."""
