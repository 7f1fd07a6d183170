"""Checkpoints on disk: the Hugging Face directory, GGUF, and the atomic writing they all go through."""
