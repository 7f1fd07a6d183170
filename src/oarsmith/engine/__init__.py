"""Generation: prompts to token ids and text, with the same decoder that trains."""

from oarsmith.engine.engine import Engine, Prompt, Stream
from oarsmith.engine.request import Completion, FinishReason
from oarsmith.engine.sampling import Sampling

__all__ = ["Completion", "Engine", "FinishReason", "Prompt", "Sampling", "Stream"]
