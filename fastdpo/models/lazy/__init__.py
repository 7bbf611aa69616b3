"""Logits that are computed only if somebody reads them: head.py makes them, logits.py knows what goes without."""
