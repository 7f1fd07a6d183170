"""Configuration of ``oarsmith serve``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from .base import Bool, Float, Int, Strings
from .groups import ModelKeys, RuntimeKeys
from .inference import CacheKeys, SpeculativeKeys, WeightKeys
from .preferences import ProcessKeys


def _to_pairs(value: object) -> object:
    """NAME=DIR, several with commas between them or as a list; or a mapping."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, (list, tuple)):
        words = [part for word in value for part in str(word).split(",")]
        pairs = [word.partition("=") for word in words]
        if not all(name and folder for name, _, folder in pairs):
            raise ValueError("must be NAME=DIR")
        if len({name for name, _, _ in pairs}) < len(pairs):
            raise ValueError("has a name twice")
        return tuple(words)
    if isinstance(value, dict):
        return tuple(f"{name}={folder}" for name, folder in value.items())
    return value


Pairs = Annotated[tuple[str, ...], BeforeValidator(_to_pairs)]


class ServeConfig(ModelKeys, WeightKeys, SpeculativeKeys, CacheKeys, ProcessKeys, RuntimeKeys):
    """All keys of ``oarsmith serve``: a model behind HTTP, gRPC and a page."""

    title: ClassVar[str] = "Server"
    command: ClassVar[str] = "serve"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path",)

    # Not needed to make a key.
    model_name_or_path: str = Field(
        "", description="The model: a Hugging Face directory, or a run folder of Oarsmith. Nothing is downloaded."
    )
    host: str = Field(
        "127.0.0.1", description="Address to listen on. Beyond 127.0.0.1 anybody who reaches it can ask: give api_keys."
    )
    port: Int = Field(8011, ge=0, le=65535, description="Port of HTTP. 0: any free one.")
    grpc_port: Int | None = Field(
        None, ge=0, le=65535, description="Port of KServe's gRPC protocol. Not given: no gRPC."
    )
    ui_port: Int | None = Field(
        None, ge=1, le=65535, description="Port of a page to chat on, on the same host. Not given: no page."
    )
    served_model_name: str | None = Field(
        None, description="The model's name in requests and answers. Not given: the name of its folder."
    )
    adapters: Pairs = Field(
        (),
        description="LoRA adapters as NAME=DIR; requests choose one by giving NAME as model. Repeat the key for "
        "several, or put commas between them.",
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="Where an OpenAI request says nothing of temperature, top_p, ...: auto takes what the model's "
        "generation_config.json names, none takes OpenAI's temperature of 1.",
    )
    batch_size: Int = Field(32, ge=1, description="Answers made at the same time; others wait.")
    max_waiting: Int = Field(256, ge=0, description="Requests that may wait; more are refused with 429.")
    max_prompt_tokens: Int | None = Field(
        None, ge=1, description="Longest prompt, in tokens. Not given: what the context has room for."
    )
    max_new_tokens: Int = Field(
        4096, ge=1, description="Longest answer, in tokens, also where a request names no limit."
    )
    max_answers: Int = Field(16, ge=1, description="Answers that one request may ask for (n, best_of, num_beams).")
    max_body_bytes: Int = Field(8 << 20, ge=1024, description="Largest request, in bytes; larger ones get 413.")
    request_seconds: Float = Field(600.0, gt=0, description="Seconds until an answer that is not finished is given up.")
    body_seconds: Float = Field(30.0, gt=0, description="Seconds that a client may take to send its request.")
    grace_seconds: Float = Field(
        30.0, ge=0, description="Seconds that open requests may go on after SIGTERM; new ones are refused with 503."
    )
    api_keys: str | None = Field(
        None,
        description="A file of API keys: lines NAME sha256:HASH [requests_per_minute=N] [tokens_per_minute=N] "
        "[concurrency=N], or the same as YAML or JSON. SIGHUP reads it again. Not given: anybody may ask.",
    )
    new_api_key: str | None = Field(
        None, description="Make a key with this name, print it and its line for the file api_keys, and end."
    )
    cors_origins: Strings = Field(
        (), description="Origins of web pages that may ask ('*': any). Repeat the key for several. Not given: none."
    )
    metrics: Literal["open", "key", "off"] = Field(
        "open", description="GET /metrics for Prometheus: for anybody, with an API key only, or not at all."
    )
    tls_certfile: str | None = Field(None, description="Certificate with its chain, in PEM: HTTPS and gRPC over TLS.")
    tls_keyfile: str | None = Field(None, description="The certificate's private key, in PEM.")
    log_requests: Bool = Field(True, description="Write a line of JSON for every request to stderr.")
    log_prompts: Bool = Field(False, description="Those lines hold prompts and answers as well.")
    replicas: Int = Field(
        1, ge=1, description="Engines behind the one port, each a process of its own. Above 1: by Ray Serve."
    )

    @property
    def adapter_folders(self) -> dict[str, str]:
        """Folder of each adapter by its name."""
        return {name: folder for name, _, folder in (pair.partition("=") for pair in self.adapters)}
