"""Rewards that check an answer: maths, JSON, patterns, equality, shape, and code that is run."""
