"""Generation: prompts to token ids and text, with the same decoder that trains."""

from oarsmith.engine.engine import Engine
from oarsmith.engine.intake import Prompt
from oarsmith.engine.request import Completion, FinishReason
from oarsmith.engine.sampling import Sampling
from oarsmith.engine.stream import Stream
from oarsmith.engine.ticket import Output

__all__ = ["Completion", "Engine", "FinishReason", "Output", "Prompt", "Sampling", "Stream"]
