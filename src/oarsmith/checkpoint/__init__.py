"""Checkpoints on disk: the Hugging Face directory and GGUF."""
