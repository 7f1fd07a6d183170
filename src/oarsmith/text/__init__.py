"""Text: tokenizers and chat templates, one renderer for training, evaluation and serving."""

from oarsmith.text.chat import ChatTemplate
from oarsmith.text.load import load_tokenizer
from oarsmith.text.stream import StreamDecoder
from oarsmith.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "StreamDecoder", "Tokenizer", "load_tokenizer"]
