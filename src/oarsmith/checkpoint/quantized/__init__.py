"""Quantized checkpoints, seen as the float ones they stand for; one file a format."""
