"""GGUF, llama.cpp's format: files to model directories and back, one tensor in memory at a time."""
