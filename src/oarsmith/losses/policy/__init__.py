"""Policy-gradient objectives as pure functions on the log-probabilities of sampled tokens."""
