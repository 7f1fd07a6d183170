"""Objectives as pure functions on token log-probabilities; each returns a sum and a count, the loop divides once."""
