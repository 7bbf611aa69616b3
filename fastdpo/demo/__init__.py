"""``make demo``: DPO-trains a small model with TRL as it is, then with fastdpo swapped in."""
