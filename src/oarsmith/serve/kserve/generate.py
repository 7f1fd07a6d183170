"""Triton's ``generate``: a request and its replies as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oarsmith.serve.errors import invalid
from oarsmith.serve.kserve import card
from oarsmith.serve.kserve.infer import as_json_list
from oarsmith.serve.kserve.native import NativeRequest, parse, parse_text
from oarsmith.serve.kserve.replies import Reply
from oarsmith.serve.kserve.tensors import INPUT, OUTPUT

# What the backends of other engines call some of the fields.
_OTHER_NAMES = {"stop": "stop_sequences", "random_seed": "seed"}


@dataclass(frozen=True)
class Generate:
    """A request without tensors.

    Attributes:
        raw: its text is to be continued as it is.
        tensor: the reply goes by the name of the model's output, as JSON text.
    """

    native: NativeRequest
    id: str
    raw: bool
    tensor: bool

    @classmethod
    def read(cls, body: object) -> Generate:
        """The request in a JSON value: ``text_input`` with parameters inside ``parameters`` or beside it, the fields
        of a native request, or a native request as JSON text under the name of the model's input.

        Raises:
            ApiError: it is none of these.
        """
        if not isinstance(body, Mapping):
            raise invalid("the request must be a JSON object")
        fields = dict(body)
        id, parameters = fields.pop("id", ""), fields.pop("parameters", {})
        if not isinstance(id, str) or len(id) > 256:
            raise invalid("id must be a text of at most 256 characters", "id")
        if not isinstance(parameters, Mapping):
            raise invalid("parameters must be a JSON object", "parameters")
        twice = sorted(fields.keys() & parameters.keys())
        if twice:
            raise invalid(f"{twice[0][:100]} is given twice", twice[0])
        fields |= parameters
        if id:
            fields.setdefault("req_id", id)
        if INPUT in fields:
            return cls(_native(fields, id), id, raw=False, tensor=True)
        raw = "text_input" in fields
        if raw:
            if "text" in fields:
                raise invalid("give one of text_input and text", "text")
            fields["text"] = fields.pop("text_input")
        for other, name in _OTHER_NAMES.items():
            if other in fields:
                if name in fields:
                    raise invalid(f"{other} and {name} mean the same; give one of them", other)
                fields[name] = fields.pop(other)
        if isinstance(fields.get("stop_sequences"), str):
            fields["stop_sequences"] = [fields["stop_sequences"]]
        if fields.get("response_type", "fastdeploy") != "fastdeploy":
            raise invalid("response_type has no place here: the answer is text_output", "response_type")
        return cls(parse(fields), id, raw=raw, tensor=False)

    def answer(self, model: str, reply: Reply) -> Reply:
        """The one reply."""
        return self._named(model, {OUTPUT: as_json_list(reply)} if self.tensor else _without("result", reply))

    def part(self, model: str, reply: Reply) -> Reply:
        """One of the replies as they come."""
        return self._named(model, {OUTPUT: as_json_list(reply)} if self.tensor else _without("token", reply))

    def _named(self, model: str, values: Reply) -> Reply:
        named = {"id": self.id} if self.id else {}
        return {**named, "model_name": model, "model_version": card.VERSION, **values}


def _native(fields: Mapping[str, Any], id: str) -> NativeRequest:
    others = sorted(fields.keys() - {INPUT, "req_id"})
    if others:
        raise invalid(f"{others[0][:100]} has no place beside {INPUT}; it belongs into the request there", others[0])
    if not isinstance(fields[INPUT], str):
        raise invalid(f"{INPUT} must be a text: the request as JSON", INPUT)
    request = parse(parse_text(fields[INPUT]))
    return request.model_copy(update={"req_id": id}) if id and "req_id" not in request.model_fields_set else request


def _without(text: str, reply: Reply) -> Reply:
    """Triton's name for the text, and what programs need beside it."""
    kept = ("finish_reason", "usage")
    return {"text_output": reply[text], **{name: reply[name] for name in kept if name in reply}}
