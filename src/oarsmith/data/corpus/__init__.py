"""Corpora for pretraining: token files on disk, their samples, blends and batches."""
