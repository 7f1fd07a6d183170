"""OpenAI's API over one service."""

from oarsmith.serve.openai.routes import router

__all__ = ["router"]
