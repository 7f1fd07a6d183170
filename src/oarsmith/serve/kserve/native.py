"""A request as PaddleNLP's Triton server took it: checked, with its defaults, made ready for the engine."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from oarsmith.engine import Sampling
from oarsmith.errors import OarsmithError
from oarsmith.serve.errors import ApiError, from_oarsmith, invalid
from oarsmith.serve.service import Service

MODEL_ALIAS = "model"
"""What the suite's server calls its one model."""

_Length = Annotated[int, Field(ge=1)]
_Score = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Text = Annotated[str, Field(min_length=1)]


class NativeMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: _Text
    content: str


class NativeRequest(BaseModel):
    """The fields of the suite's server, and its defaults; of names that mean the same, one may be given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    req_id: Annotated[str, Field(min_length=1, max_length=256)] = Field(default_factory=lambda: str(uuid.uuid4()))
    text: _Text | None = None
    input_ids: Annotated[list[int], Field(min_length=1)] | None = None
    messages: Annotated[list[NativeMessage], Field(min_length=1)] | None = None
    system: str | None = None
    max_dec_len: _Length | None = None
    seq_len: _Length | None = None
    max_tokens: _Length | None = None
    min_dec_len: _Length = 1
    topp: _Share | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.95
    penalty_score: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    frequency_score: _Score = 0.0
    presence_score: _Score = 0.0
    eos_token_ids: Annotated[list[int], Field(max_length=1)] | int | None = None
    stop_sequences: Annotated[list[_Text], Field(max_length=64)] | None = None
    infer_seed: _Seed | None = None
    seed: _Seed | None = None
    stream: bool | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    return_usage: bool = False
    return_all_tokens: bool = False
    # 0 and 1 as the suite writes them, false and true as JSON does.
    enable_text_truncate: Annotated[bool, Field(strict=False)] = True
    benchmark: bool = False
    model: str | None = None
    response_type: Literal["fastdeploy", "openai"] = "fastdeploy"

    @property
    def chat(self) -> list[dict[str, str]] | None:
        """The conversation, ``system`` in front; None where there is none."""
        if self.messages is None:
            return None
        return [*self._system(), *(message.model_dump() for message in self.messages)]

    @property
    def text_as_chat(self) -> list[dict[str, str]]:
        """``text`` as a user's message, ``system`` in front."""
        assert self.text is not None
        return [*self._system(), {"role": "user", "content": self.text}]

    def _system(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    @property
    def longest(self) -> int | None:
        """Most tokens of the answer; None: as many as there is room for."""
        return next((value for value in (self.max_dec_len, self.seq_len, self.max_tokens) if value is not None), None)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end the answer beside the model's own."""
        return [self.eos_token_ids] if isinstance(self.eos_token_ids, int) else self.eos_token_ids or []


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that the engine can be asked.

    Attributes:
        seed: that of the sampling: the client's, or one that was drawn for it.
        stop_ids: tokens that end the answer.
        came, prepared: when it came and when its ids were known, seconds since the epoch.
    """

    request: NativeRequest
    ids: list[int]
    sampling: Sampling
    seed: int
    stop_ids: frozenset[int]
    adapter: str | None
    priority: int
    came: float
    prepared: float


def parse(body: object) -> NativeRequest:
    """The request in a JSON value: an object, or a list of one.

    Raises:
        ApiError: a field that is unknown, has a wrong value, or contradicts another.
    """
    if isinstance(body, list):
        if len(body) != 1:
            raise invalid(f"the list has {len(body)} requests; it must have one")
        body = body[0]
    if not isinstance(body, Mapping):
        raise invalid("the request must be a JSON object, or a list of one")
    # The suite's clients write null for what is not given.
    given = {name: value for name, value in body.items() if value is not None}
    if isinstance(given.get("response_type"), str):
        given["response_type"] = given["response_type"].lower()
    if given.get("eos_token_ids") == [None]:
        del given["eos_token_ids"]
    try:
        request = NativeRequest.model_validate(given)
    except ValidationError as error:
        raise first_mistake(error) from error
    _check_together(request)
    return request


def of_model(request: NativeRequest, adapter: str | None) -> NativeRequest:
    """The request to the model under whose name it came.

    Raises:
        ApiError: it names another one.
    """
    if adapter is None:
        return request
    if request.model not in (None, adapter):
        raise invalid(f"the request came to the model {adapter!r} and names another one", "model")
    return request.model_copy(update={"model": adapter})


def parse_text(text: str | bytes) -> object:
    """A JSON value.

    Raises:
        ApiError: the text is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid("the request is not valid JSON") from error


def first_mistake(error: ValidationError, where: str | None = None) -> ApiError:
    """What a client is told of fields that are wrong, without what was in them."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part)[:100] for part in (*([] if where is None else [where]), *first["loc"]))
    what = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"]
    return invalid(f"{place}: {what}" if place else what, place or None)


def _check_together(request: NativeRequest) -> None:
    given = request.model_fields_set
    sources = [name for name in ("text", "input_ids", "messages") if name in given]
    if len(sources) != 1:
        found = f"; {' and '.join(sources)} are given" if sources else ""
        raise invalid(f"give one of text, input_ids and messages{found}", sources[1] if sources else "text")
    for names in (("max_dec_len", "seq_len", "max_tokens"), ("topp", "top_p"), ("infer_seed", "seed")):
        several = [name for name in names if name in given]
        if len(several) > 1:
            raise invalid(f"{' and '.join(several)} mean the same; give one of them", several[1])
    if request.system is not None and request.input_ids is not None:
        raise invalid("system has no place beside input_ids", "system")
    if request.system is not None and request.messages is not None and request.messages[0].role == "system":
        raise invalid("messages begin with a system message already", "system")


async def prepare(service: Service, request: NativeRequest, *, raw: bool = False, priority: int = 0) -> Job:
    """Ids and sampling of a request.

    Args:
        raw: ``text`` is to be continued as it is; else it is a user's message, where the model has a chat template.

    Raises:
        ApiError: it cannot be answered.
    """
    came = time.time()
    adapter = None if request.model == MODEL_ALIAS else service.adapter_of(request.model)
    if request.longest is not None and request.longest > service.limits.max_new_tokens:
        most = service.limits.max_new_tokens
        raise invalid(
            f"max_dec_len {request.longest} is over the limit: this server gives at most {most}", "max_dec_len"
        )
    if request.system is not None and (raw or service.tokenizer.chat_template is None):
        raise invalid("the prompt goes without a chat template: there is no place for system", "system")
    seeds = (seed for seed in (request.infer_seed, request.seed) if seed is not None)
    seed = next(seeds, None)
    seed = secrets.randbits(31) if seed is None else seed
    ids = await _ids(service, request, raw)
    sampling = _sampling(service, request, seed, service.worker.engine.context_length - len(ids))
    return Job(
        request=request,
        ids=ids,
        sampling=sampling,
        seed=seed,
        stop_ids=frozenset((*service.tokenizer.stop_ids, *request.stop_ids)),
        adapter=adapter,
        priority=priority,
        came=came,
        prepared=time.time(),
    )


def _sampling(service: Service, request: NativeRequest, seed: int, room: int) -> Sampling:
    share = next((share for share in (request.topp, request.top_p) if share is not None), 0.7)
    longest = min(room, service.limits.max_new_tokens if request.longest is None else request.longest)
    if request.min_dec_len > longest:
        what = f"min_dec_len {request.min_dec_len} is more than the {longest} tokens that there is room for"
        raise invalid(what, "min_dec_len")
    return service.sampling(
        max_new_tokens=longest,
        min_new_tokens=request.min_dec_len,
        # A share of 0 leaves the likeliest token alone.
        temperature=request.temperature if share > 0 else 0.0,
        top_p=share if share > 0 else 1.0,
        top_k=request.top_k,
        repetition_penalty=request.penalty_score,
        frequency_penalty=request.frequency_score,
        presence_penalty=request.presence_score,
        stop=request.stop_sequences or (),
        stop_ids=request.stop_ids,
        seed=seed,
    )


async def _ids(service: Service, request: NativeRequest, raw: bool) -> list[int]:
    """Ids of the prompt, cut where it is too long and may be cut."""
    if request.input_ids is not None:
        ids = request.input_ids
    else:
        try:
            ids = await anyio.to_thread.run_sync(_spell, service, request, raw)
        except OarsmithError as error:
            raise from_oarsmith(error) from error
    if request.enable_text_truncate:
        # The end is kept: it asks the question, and begins the answer.
        ids = ids[-_most(service, request, len(ids)) :]
    ids = await service.encode(ids, param="input_ids" if request.input_ids is not None else None)
    if len(ids) + request.min_dec_len > service.worker.engine.context_length:
        what = f"the prompt has {len(ids)} tokens; with min_dec_len {request.min_dec_len} that is more than the context"
        raise invalid(f"{what} of {service.worker.engine.context_length}", "min_dec_len")
    return ids


def _spell(service: Service, request: NativeRequest, raw: bool) -> list[int]:
    tokenizer = service.tokenizer
    if request.chat is not None:
        return tokenizer.encode_chat(request.chat, None, True)
    assert request.text is not None
    if raw or tokenizer.chat_template is None:
        return tokenizer.encode(request.text)
    return tokenizer.encode_chat(request.text_as_chat, None, True)


def _most(service: Service, request: NativeRequest, size: int) -> int:
    """Most tokens of a prompt that may be cut."""
    context = service.worker.engine.context_length
    # Where no length is asked for, a prompt is cut only if it must be, and then there is to be an answer.
    least = request.min_dec_len if request.longest is None else request.longest
    kept = size
    if size + least > context:
        wanted = max(least, min(context // 4, service.limits.max_new_tokens)) if request.longest is None else least
        kept = context - wanted
        if kept < 1:
            name = "min_dec_len" if request.longest is None else "max_dec_len"
            raise invalid(f"{name} {least} leaves no room for a prompt in the context of {context} tokens", name)
    most = service.limits.max_prompt_tokens
    return kept if most is None else min(kept, most)
