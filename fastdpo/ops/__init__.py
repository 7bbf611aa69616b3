"""The engines: what computes what the public functions describe. `engines.py` says which."""
