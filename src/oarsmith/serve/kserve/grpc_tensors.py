"""Inference requests and replies as gRPC messages."""

from __future__ import annotations

from typing import Any

from oarsmith.serve.errors import invalid
from oarsmith.serve.kserve import card
from oarsmith.serve.kserve.infer import as_json_list
from oarsmith.serve.kserve.messages import message
from oarsmith.serve.kserve.replies import Reply
from oarsmith.serve.kserve.tensors import OUTPUT, check_input, check_output, decode, pack_text, unpack_text
from oarsmith.serve.kserve.terms import Terms, read_terms

_Response = message("ModelInferResponse")
_StreamResponse = message("ModelStreamInferResponse")
FINAL = "triton_final_response"


def read_request(request: Any) -> tuple[str, Terms]:
    """The native request, JSON text, in a ModelInferRequest, and its parameters.

    Raises:
        ApiError: the tensors are not what the model takes.
    """
    terms = read_terms({name: _value(parameter) for name, parameter in request.parameters.items()})
    for output in request.outputs:
        check_output(output.name)
    if len(request.inputs) != 1:
        raise invalid(f"the request has {len(request.inputs)} inputs; the model takes one", "inputs")
    tensor = request.inputs[0]
    check_input(tensor.name, tensor.datatype, list(tensor.shape))
    raw, given = list(request.raw_input_contents), list(tensor.contents.bytes_contents)
    if bool(raw) == bool(given) or len(raw) + len(given) != 1:
        raise invalid(f"{tensor.name} must have one element, in raw_input_contents or in bytes_contents", "inputs")
    return unpack_text(raw[0]) if raw else decode(given[0]), terms


def _value(parameter: Any) -> object:
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def response(request: Any, reply: Reply, *, last: bool | None = None) -> Any:
    """A reply to a ModelInferRequest.

    Args:
        last: whether it is the last of a stream; None: there is no stream.
    """
    answer = _Response(model_name=request.model_name, model_version=card.VERSION, id=request.id)
    answer.outputs.add(name=OUTPUT, datatype="BYTES", shape=[1])
    answer.raw_output_contents.append(pack_text(as_json_list(reply)))
    if last is not None:
        answer.parameters[FINAL].bool_param = last
    return answer


def stream_response(request: Any, reply: Reply, *, last: bool) -> Any:
    """A reply to a request of a stream."""
    return _StreamResponse(infer_response=response(request, reply, last=last))


def stream_error(request: Any, what: str) -> Any:
    """What a stream is told of a request that is none; the stream goes on."""
    answer = _StreamResponse(error_message=what)
    answer.infer_response.id = request.id
    answer.infer_response.model_name = request.model_name
    answer.infer_response.parameters[FINAL].bool_param = True
    return answer
