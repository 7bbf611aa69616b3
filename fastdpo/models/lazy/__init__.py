"""Logits that are computed only if somebody reads them: tensor.py, rows.py, logits.py; source.py and head.py."""
