"""logits -> log p of chosen columns, for callers that already hold logits."""
