"""The chat page: a client of the server like others, for people with a browser."""

from oarsmith.serve.ui.page import Page, launch

__all__ = ["Page", "launch"]
