"""Oarsmith's models for lm-evaluation-harness, under the name ``oarsmith``.

Importing this module registers it. Texts are tokenized, truncated and scored by the rules of the harness' own class for
transformers (``hf``), so that numbers of both can be compared. The harness' command line with this model:
``python -m oarsmith.engine.lm_eval_model --model oarsmith --model_args path=MODEL --tasks NAME``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from oarsmith.engine.engine import Engine
from oarsmith.engine.sampling import Sampling
from oarsmith.errors import ConfigError
from oarsmith.training.evaluate import Piece, score_pieces

_DEFAULT_NEW_TOKENS = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Encoded = tuple[Any, list[int], list[int]]
"""The texts (None: nothing to cache), ids of the context, ids of what is to be scored after it."""


@register_model("oarsmith")
class OarsmithLM(TemplateLM):
    """A model directory, adapter or run folder, or an engine that is there already.

    Args:
        path, adapter, dtype, device: as ``Engine`` takes them.
        batch_size: answers generated at the same time; the harness passes it as text, and ``auto`` is 8.
        max_length: tokens that a context and what follows it may have together; not given: the model's context.
        max_batch_size: accepted because the harness passes it; sizes follow from the tokens here.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        adapter: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        if (path is None) == (engine is None):
            raise ConfigError("give a path or an engine", fix="--model_args path=MODEL")
        if engine is None:
            size = int(batch_size) if str(batch_size).isdigit() else 8
            # The harness' own command line says cuda:0 whatever the machine.
            device = None if str(device).startswith("cuda") and not torch.cuda.is_available() else device
            engine = Engine(path or "", dtype=dtype, device=device or "auto", adapter=adapter, batch_size=size)
        if engine.tokenizer is None:
            raise ConfigError("the engine has no tokenizer", fix="pass tokenizer= to Engine")
        self._engine, self._tokenizer = engine, engine.tokenizer
        self._name = str(path or "oarsmith")
        self._max_length = max_length or engine.context_length
        self._device = engine.model.device

    @property
    def eot_token_id(self) -> int:
        if self._tokenizer.eos_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token", where=self._name, fix="name one in its files"
            )
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's text, which the harness keeps with the results."""
        template = self._tokenizer.chat_template
        return "" if template is None or not chat_template else "\n".join(template.sources().values())

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        if add_generation_prompt:
            return self._tokenizer.apply_chat_template(chat_history, add_generation_prompt=True)
        # The last message is the beginning of the answer.
        before = self._tokenizer.apply_chat_template(chat_history[:-1], add_generation_prompt=True)
        return before + str(chat_history[-1]["content"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._tokenizer.decode([self.prefix_token_id]))
        return self._tokenizer.encode(string, add_special_tokens)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in requests:
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts: list[Encoded] = [(None, *make_disjoint_window(pair)) for pair in pairs]
            total = sum(logprob for logprob, _ in self._loglikelihood_tokens(parts))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        pieces = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            ids = (context + continuation)[-(self.max_length + 1) :]
            if continuation:
                pieces[number] = Piece(ids, max(len(ids) - len(continuation), 1))
        # Alike lengths together: a pass then holds as many texts as it can.
        order = sorted(pieces, key=lambda number: len(pieces[number].ids))
        scores = score_pieces(self._engine.model, [pieces[number] for number in order])
        for number, score in zip(order, scores, strict=True):
            found[number] = (score.logprob, score.greedy)
        for (texts, _context, _continuation), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            sampling = sampling_of(requests[numbers[0]].args[1])
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"an answer of {sampling.max_new_tokens} tokens leaves no room for a question in {self.max_length}",
                    where=self._name,
                    fix="lower the task's max_gen_toks",
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            for number, completion in zip(numbers, self._engine.generate(prompts, sampling), strict=True):
                answers[number] = completion.text
                self.cache_hook.add_partial("generate_until", requests[number].args, completion.text)
        return answers


def sampling_of(wanted: Mapping[str, Any]) -> Sampling:
    """A task's generation settings; greedy unless it asks for draws."""
    until = wanted.get("until") or []
    temperature = float(wanted.get("temperature") or 0.0)
    drawn = bool(wanted.get("do_sample", temperature > 0))
    limit = next((wanted[name] for name in _LIMITS if wanted.get(name) is not None), _DEFAULT_NEW_TOKENS)
    return Sampling(
        max_new_tokens=int(limit),
        temperature=(temperature or 1.0) if drawn else 0.0,
        top_k=int(wanted.get("top_k") or 0),
        top_p=float(wanted.get("top_p") or 1.0),
        stop=[text for text in ([until] if isinstance(until, str) else until) if text],
        seed=0,
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
