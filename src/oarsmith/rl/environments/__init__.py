"""Conversations in which something answers what a model writes: environments, and tools that are Python functions."""
