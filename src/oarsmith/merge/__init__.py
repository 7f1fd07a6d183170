"""Merging models: recipes, one file a kind of method, tensors streamed one by one, the proof of what was written."""
