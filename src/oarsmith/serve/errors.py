"""What a client is told when something is wrong: OpenAI's error object, without paths and tracebacks."""

from __future__ import annotations

from dataclasses import dataclass, field

from oarsmith.errors import OarsmithError
from oarsmith.serve.callers import LimitError
from oarsmith.serve.worker import BusyError, ClosedError


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one sentence, and what to do.
        type: OpenAI's word for the kind: invalid_request_error, authentication_error, rate_limit_error, server_error.
        param: the field that is wrong.
        code: a short name that programs can tell.
        headers: further headers of the answer.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, *, code: str | None = None, status: int = 400) -> ApiError:
    """The client's mistake."""
    return ApiError(status, message, param=param, code=code)


def from_oarsmith(error: OarsmithError) -> ApiError:
    """What the engine refuses. Its own words name fields, not files."""
    if isinstance(error, BusyError):
        return ApiError(429, said(error), "rate_limit_error", code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, LimitError):
        headers = {"Retry-After": str(error.seconds)}
        return ApiError(429, said(error), "rate_limit_error", code="rate_limit_exceeded", headers=headers)
    if isinstance(error, ClosedError):
        return ApiError(503, said(error), "server_error", code="closing", headers={"Retry-After": "5"})
    # Places that are no fields (an order's name) say nothing to a client.
    param = error.where if error.where is not None and error.where.isidentifier() else None
    return ApiError(400, said(error), param=param)


def said(error: OarsmithError) -> str:
    """What is wrong and what to do, in one line."""
    return f"{error.what}; {error.fix}" if error.fix else error.what
