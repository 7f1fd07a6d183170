"""Quantized models as files: one file a layout that others read."""
