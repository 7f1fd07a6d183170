"""Configuration of ``oarsmith request``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from .base import Bool, Float, Int, JobConfig


class RequestConfig(JobConfig):
    """All keys of ``oarsmith request``: ask a server over HTTP."""

    title: ClassVar[str] = "Request"
    command: ClassVar[str] = "request"
    positional: ClassVar[tuple[str, ...]] = ("prompt",)

    prompt: str = Field(description="What to ask. '-': what comes from stdin.")
    url: str = Field("http://127.0.0.1:8011", description="The server: any that speaks OpenAI's protocol.")
    api_key: str | None = Field(
        None,
        description="The API key. Better in the environment variable OARSMITH_API_KEY: others see command lines.",
    )
    served_model_name: str | None = Field(None, description="Which model or adapter. Not given: the server's first.")
    system: str | None = Field(None, description="System message put before the prompt.")
    max_new_tokens: Int | None = Field(
        None, ge=1, description="Longest answer, in tokens. Not given: the server's limit."
    )
    temperature: Float | None = Field(
        None, ge=0, description="Below 1 sharper, above 1 more random; 0 is greedy. Not given: what the server takes."
    )
    top_p: Float | None = Field(
        None, gt=0, le=1, description="Only among the likeliest tokens that together have this probability."
    )
    seed: Int | None = Field(None, ge=0, description="The same seed draws the same answer.")
    stream: Bool = Field(True, description="Print the answer while it is made.")
    timeout: Float = Field(600.0, gt=0, description="Seconds to wait for the server to say something.")
