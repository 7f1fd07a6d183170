"""The messages of Triton's gRPC service, with its field numbers, made at run time.

They live in a pool of their own: Triton's client registers files with the same names in the default one.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_Field = descriptor_pb2.FieldDescriptorProto
_KINDS = {
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
    "float": _Field.TYPE_FLOAT,
    "double": _Field.TYPE_DOUBLE,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}
_PARAMETERS = "map InferParameter parameters"

# A field a line: its number and its kind; "repeated", "map" (from texts) and "one" (of a choice) stand in front.
_MESSAGES: dict[str, dict[int, str]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {1: "bool live"},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {1: "bool ready"},
    "ModelReadyRequest": {1: "string name", 2: "string version"},
    "ModelReadyResponse": {1: "bool ready"},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {1: "string name", 2: "string version", 3: "repeated string extensions"},
    "ModelMetadataRequest": {1: "string name", 2: "string version"},
    "ModelMetadataResponse": {
        1: "string name",
        2: "repeated string versions",
        3: "string platform",
        4: "repeated TensorMetadata inputs",
        5: "repeated TensorMetadata outputs",
    },
    "ModelMetadataResponse.TensorMetadata": {1: "string name", 2: "string datatype", 3: "repeated int64 shape"},
    "InferParameter": {
        1: "one bool bool_param",
        2: "one int64 int64_param",
        3: "one string string_param",
        4: "one double double_param",
        5: "one uint64 uint64_param",
    },
    "InferTensorContents": {
        1: "repeated bool bool_contents",
        2: "repeated int32 int_contents",
        3: "repeated int64 int64_contents",
        4: "repeated uint32 uint_contents",
        5: "repeated uint64 uint64_contents",
        6: "repeated float fp32_contents",
        7: "repeated double fp64_contents",
        8: "repeated bytes bytes_contents",
    },
    "ModelInferRequest": {
        1: "string model_name",
        2: "string model_version",
        3: "string id",
        4: _PARAMETERS,
        5: "repeated InferInputTensor inputs",
        6: "repeated InferRequestedOutputTensor outputs",
        7: "repeated bytes raw_input_contents",
    },
    "ModelInferRequest.InferInputTensor": {
        1: "string name",
        2: "string datatype",
        3: "repeated int64 shape",
        4: _PARAMETERS,
        5: "InferTensorContents contents",
    },
    "ModelInferRequest.InferRequestedOutputTensor": {1: "string name", 2: _PARAMETERS},
    "ModelInferResponse": {
        1: "string model_name",
        2: "string model_version",
        3: "string id",
        4: _PARAMETERS,
        5: "repeated InferOutputTensor outputs",
        6: "repeated bytes raw_output_contents",
    },
    "ModelInferResponse.InferOutputTensor": {
        1: "string name",
        2: "string datatype",
        3: "repeated int64 shape",
        4: _PARAMETERS,
        5: "InferTensorContents contents",
    },
    "ModelStreamInferResponse": {1: "string error_message", 2: "ModelInferResponse infer_response"},
    "ModelConfigRequest": {1: "string name", 2: "string version"},
    "ModelConfigResponse": {1: "ModelConfig config"},
    # Of Triton's configuration what is said of these models; its data types are numbers here.
    "ModelConfig": {
        1: "string name",
        2: "string platform",
        4: "int32 max_batch_size",
        5: "repeated ModelInput input",
        6: "repeated ModelOutput output",
        17: "string backend",
        19: "ModelTransactionPolicy model_transaction_policy",
    },
    "ModelInput": {1: "string name", 2: "int32 data_type", 4: "repeated int64 dims"},
    "ModelOutput": {1: "string name", 2: "int32 data_type", 3: "repeated int64 dims"},
    "ModelTransactionPolicy": {1: "bool decoupled"},
    "RepositoryIndexRequest": {1: "string repository_name", 2: "bool ready"},
    "RepositoryIndexResponse": {1: "repeated ModelIndex models"},
    "RepositoryIndexResponse.ModelIndex": {
        1: "string name",
        2: "string version",
        3: "string state",
        4: "string reason",
    },
}
DATA_TYPES = {"TYPE_STRING": 13}
"""Numbers of Triton's data types."""


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, descriptor_pb2.DescriptorProto] = {}
    for path, fields in _MESSAGES.items():
        outer, _, name = path.rpartition(".")
        message = made[outer].nested_type.add(name=name) if outer else file.message_type.add(name=name)
        made[path] = message
        for number, words in fields.items():
            _add_field(message, path, number, words.split())
    return file


def _add_field(message: descriptor_pb2.DescriptorProto, path: str, number: int, words: list[str]) -> None:
    *how, kind, name = words
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if how:
        if how[0] == "one":
            if not message.oneof_decl:
                message.oneof_decl.add(name="parameter_choice")
            field.oneof_index = 0
        else:
            field.label = _Field.LABEL_REPEATED
        if how[0] == "map":
            entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
            entry.options.map_entry = True
            _add_field(entry, path, 1, ["string", "key"])
            _add_field(entry, path, 2, [kind, "value"])
            field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{path}.{entry.name}"
            return
    if kind in _KINDS:
        field.type = _KINDS[kind]
    else:
        inner = f"{path}.{kind}"
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{inner if inner in _MESSAGES else kind}"


_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(_file().SerializeToString())


def message(name: str) -> Any:
    """The class of a message."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
