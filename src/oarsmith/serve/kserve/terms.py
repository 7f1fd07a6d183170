"""The parameters of an inference request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from oarsmith.serve.errors import invalid
from oarsmith.serve.kserve.native import NativeRequest, first_mistake


class Terms(BaseModel):
    """Triton's parameters, as far as they say something to a language model.

    Attributes:
        timeout: microseconds; 0: as the request itself says.
        urgency: Triton's ``priority``: 0 or 1 comes first, then 2, ...
        binary_data_output: outputs come as binary tensors, where they do not say otherwise (HTTP).
        triton_enable_empty_final_response: the last reply is marked in any case (gRPC).
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    timeout: Annotated[int, Field(ge=0, lt=2**63)] = 0
    urgency: Annotated[int, Field(ge=0, lt=2**31, alias="priority")] = 0
    binary_data_output: bool = False
    triton_enable_empty_final_response: bool = False

    @property
    def priority(self) -> int:
        """The engine's: the higher, the sooner."""
        return -max(self.urgency - 1, 0)


def read_terms(parameters: Mapping[str, object]) -> Terms:
    """Parameters, checked.

    Raises:
        ApiError: one that is not known, or has a wrong value.
    """
    try:
        return Terms.model_validate(parameters)
    except ValidationError as error:
        raise first_mistake(error, "parameters") from error


def under_terms(request: NativeRequest, terms: Terms, name: str) -> NativeRequest:
    """The request with what stands beside it.

    Args:
        name: of the inference request; the native one is called so where it has no name of its own.

    Raises:
        ApiError: the name is too long.
    """
    changed: dict[str, object] = {}
    if name and "req_id" not in request.model_fields_set:
        if len(name) > 256:
            raise invalid("the id is longer than 256 characters", "id")
        changed["req_id"] = name
    if terms.timeout:
        changed["timeout"] = min(request.timeout, terms.timeout / 1e6)
    return request.model_copy(update=changed)
