"""Adapters: rewrites of linear maps described by a small frozen config.

The decoder and the families know nothing of them.
"""
