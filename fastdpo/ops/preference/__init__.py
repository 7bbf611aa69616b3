"""Preference losses from log-probs: csrc's templates, in one launch each way, otherwise plain torch."""
