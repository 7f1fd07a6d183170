"""Preference objectives: pairs of answers of which the first one is preferred."""
