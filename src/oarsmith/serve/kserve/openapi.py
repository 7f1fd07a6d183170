"""What the server's own description says of these routes: they read bodies themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class Error(BaseModel):
    """What went wrong, as the protocol has it."""

    error: str


RESPONSES: dict[int | str, dict[str, Any]] = {
    404: {"model": Error, "description": "No such model or version"},
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    **RESPONSES,
    400: {"model": Error, "description": "The request cannot be answered"},
    413: {"model": Error, "description": "The body is too long"},
    415: {"model": Error, "description": "The body is packed in an unknown way"},
    429: {"model": Error, "description": "As many requests wait as may"},
    503: {"model": Error, "description": "The server is ending"},
    504: {"model": Error, "description": "The answer took too long"},
}
HEALTH: dict[int | str, dict[str, Any]] = {200: {"description": "Yes"}, 503: {"description": "No"}}


def body(model: type[BaseModel], **more: Any) -> dict[str, Any]:
    """The description of a JSON body.

    Args:
        more: further properties of the object.
    """
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})
    schema = _inlined(schema, parts)
    schema["properties"] |= more
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(value: Any, parts: dict[str, Any]) -> Any:
    """References point into the whole document, where the parts do not stand."""
    if isinstance(value, list):
        return [_inlined(item, parts) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return _inlined({**parts[name], **{key: item for key, item in value.items() if key != "$ref"}}, parts)
    return {key: _inlined(item, parts) for key, item in value.items()}
