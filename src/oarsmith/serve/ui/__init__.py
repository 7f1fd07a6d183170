"""The chat page."""

from oarsmith.serve.ui.page import Page, launch

__all__ = ["Page", "launch"]
