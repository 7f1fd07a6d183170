"""One line of JSON for every request, without what was said unless that is asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import datetime, timezone
from typing import Any, TextIO

from oarsmith.serve.callers import Call
from oarsmith.serve.service import Service


class AccessLog:
    """Writes the lines.

    Args:
        prompts: whether prompts and answers are written too.
        to: where; not given: stderr.
    """

    def __init__(self, service: Service, *, prompts: bool = False, to: TextIO | None = None) -> None:
        self.prompts = prompts
        self._service = service
        self._to = to

    def write(self, scope: Any, call: Call, status: int, began: float) -> None:
        """A request is done; ``began`` by ``time.monotonic``, status 0: the client left before there was one."""
        client = scope.get("client")
        line: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": call.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(time.monotonic() - began, 4),
            "client": client[0] if client else None,
        }
        if call.caller is not None:
            line["key"] = call.caller.name
        if call.num_prompt_tokens:
            line |= {"prompt_tokens": call.num_prompt_tokens, "generated_tokens": call.num_tokens}
        if call.prompts:
            decode = self._service.tokenizer.decode
            line |= {"prompts": [decode(ids) for ids in call.prompts], "answers": call.answers}
        print(json.dumps(line, ensure_ascii=False), file=self._to or sys.stderr, flush=True)


class JsonLines(logging.Formatter):
    """Other messages in the same form."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
