"""Typed, frozen configurations: one class a job, flat keys, files plus overrides, and where every value came from.

``load.load_config`` is the entry; the classes are in ``sft``, ``inference``, ``checkpoints`` and ``tools``.
"""
