"""Models, tokens and vectors: what needs no answer."""

from __future__ import annotations

import base64
from array import array
from typing import Any

import anyio.to_thread

from oarsmith.serve.errors import invalid
from oarsmith.serve.openai.completions import prompts_of
from oarsmith.serve.openai.mapping import messages_of, template_variables
from oarsmith.serve.openai.schemas import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from oarsmith.serve.service import Service


def list_models(service: Service) -> dict[str, Any]:
    """``GET /v1/models``."""
    return {"object": "list", "data": [card(service, name) for name in service.model_names]}


def card(service: Service, name: str) -> dict[str, Any]:
    """A model; an adapter names the model it is on.

    Raises:
        ApiError: there is no such model.
    """
    adapter = service.adapter_of(name)
    return {
        "id": name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "oarsmith",
        "root": service.name,
        "parent": None if adapter is None else service.name,
        "max_model_len": service.worker.engine.context_length,
    }


async def embed(service: Service, body: EmbeddingRequest) -> dict[str, Any]:
    """``POST /v1/embeddings``: the mean of the last hidden states, of length 1.

    Raises:
        ApiError: a text that the model cannot read, too many texts, an adapter.
    """
    if service.adapter_of(body.model) is not None:
        raise invalid("embeddings are the model's own; adapters have none", "model")
    prompts = prompts_of(body.input)
    if len(prompts) > 2048:
        raise invalid(f"{len(prompts)} texts are more than the 2,048 that are taken at once", "input")
    ids = [await service.encode(prompt, param="input") for prompt in prompts]
    data = []
    for index, document in enumerate(ids):
        # One at a time: answers go on between them.
        vector = (await service.worker.call(lambda engine, document=document: engine.embed([document])))[0]  # type: ignore[misc]
        shown = vector if body.encoding_format == "float" else base64.b64encode(array("f", vector).tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    count = sum(map(len, ids))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": service.name, "usage": usage}


async def tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    """``POST /tokenize``.

    Raises:
        ApiError: neither a text nor a conversation, or both.
    """
    service.adapter_of(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.messages is not None:
        variables = template_variables(body.chat_template_kwargs, body.add_generation_prompt)
        ids = await service.encode(messages_of(body.messages), param="messages", **variables)
    else:
        ids = await anyio.to_thread.run_sync(service.tokenizer.encode, body.prompt or "", body.add_special_tokens)
    names = [service.tokenizer.id_to_token(token) for token in ids] if body.return_token_strs else None
    most = service.worker.engine.context_length
    return {"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": names}


def detokenize(service: Service, body: DetokenizeRequest) -> dict[str, Any]:
    """``POST /detokenize``.

    Raises:
        ApiError: an id that the tokenizer does not have.
    """
    service.adapter_of(body.model)
    size = service.tokenizer.vocab_size
    if any(token >= size for token in body.tokens):
        raise invalid(f"a token is outside the vocabulary of {size}", "tokens")
    return {"prompt": service.tokenizer.decode(body.tokens)}
