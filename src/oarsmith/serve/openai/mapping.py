"""Fields of a request to the engine's sampling and prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from oarsmith.engine import Sampling
from oarsmith.serve.errors import invalid
from oarsmith.serve.openai.schemas import Message, SamplingFields
from oarsmith.serve.service import Service

# Names that functions on the way to the template have for other things; where a field exists, it is the one to use.
_NOT_VARIABLES = frozenset({"add_generation_prompt", "messages", "param", "prompt", "self", "tools", "where"})


def sampling_of(service: Service, request: SamplingFields, max_new_tokens: int | None, **more: Any) -> Sampling:
    """How an answer is drawn; without ``n`` where all of them would be the same (see ``copies_of``).

    Args:
        more: what only some endpoints have.

    Raises:
        ApiError: a value, or a combination of them, that cannot be.
    """
    values: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        **service.defaults,
        "stop": (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        "stop_ids": tuple(request.stop_token_ids or ()),
        "ignore_eos": request.ignore_eos,
        "bad_words": tuple(request.bad_words or ()),
        "logit_bias": _bias(request),
        **_constraint(request),
        **more,
    }
    if request.top_k is not None:
        values["top_k"] = max(request.top_k, 0)
    optional = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "typical_p": request.typical_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "min_new_tokens": request.min_tokens,
        "seed": request.seed,
    }
    values |= {name: value for name, value in optional.items() if value is not None}
    if request.best_of is not None and request.best_of < request.n:
        raise invalid(f"best_of {request.best_of} is less than n {request.n}", "best_of")
    if not _is_greedy(service, request):
        values |= {"n": request.n, "best_of": request.best_of}
    return service.sampling(**values)


def copies_of(service: Service, request: SamplingFields) -> int:
    """How often the one answer is given: greedy answers are all alike."""
    return request.n if _is_greedy(service, request) else 1


def _is_greedy(service: Service, request: SamplingFields) -> bool:
    temperature = service.defaults["temperature"] if request.temperature is None else request.temperature
    return temperature < 1e-5


def _bias(request: SamplingFields) -> dict[int, float]:
    bias = request.logit_bias or {}
    if not all(key.isdecimal() and len(key) < 10 for key in bias):
        raise invalid("logit_bias has a key that is no token id", "logit_bias")
    return {int(key): value for key, value in bias.items()}


def _constraint(request: SamplingFields) -> dict[str, Any]:
    found: dict[str, Any] = {
        "json_schema": request.guided_json,
        "regex": request.guided_regex,
        "grammar": request.guided_grammar,
    }
    if request.guided_choice:
        found["choices"] = tuple(request.guided_choice)
    form = request.response_format
    if form is not None and form.type == "json_object":
        found["json_object"] = True
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise invalid("response_format is json_schema but has no schema", "response_format.json_schema")
        if request.guided_json is not None:
            raise invalid("response_format and guided_json both give a schema", "guided_json")
        found["json_schema"] = form.json_schema.schema_
    return {name: value for name, value in found.items() if value is not None}


def template_variables(given: dict[str, Any] | None, add_generation_prompt: bool) -> dict[str, Any]:
    """What a chat template reads beside the conversation.

    Raises:
        ApiError: a name that stands for something else.
    """
    taken = sorted(_NOT_VARIABLES & set(given or {}))
    if taken:
        raise invalid(f"chat_template_kwargs cannot set {taken[0]}", "chat_template_kwargs")
    return {**(given or {}), "add_generation_prompt": add_generation_prompt}


def messages_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates read them: texts whole, arguments of calls as objects.

    Raises:
        ApiError: arguments that are no JSON object.
    """
    return [_message(message, f"messages.{index}") for index, message in enumerate(messages)]


def _message(message: Message, place: str) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id or f"call{number:05d}",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"{place}.tool_calls.{number}.function.arguments"),
                },
            }
            for number, call in enumerate(message.tool_calls)
        ]
    return found


def _arguments(given: str | dict[str, Any], place: str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        found = json.loads(given or "{}")
    except ValueError as error:
        raise invalid("arguments are no JSON", place) from error
    if not isinstance(found, dict):
        raise invalid("arguments are no JSON object", place)
    return found
