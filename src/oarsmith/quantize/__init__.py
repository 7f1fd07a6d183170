"""Quantization: grids, calibration, one file an algorithm, and the proof of what it cost."""
