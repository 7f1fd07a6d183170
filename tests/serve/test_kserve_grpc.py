"""KServe v2 over gRPC, by Triton's own client."""

import json
import queue
import subprocess
import time
from itertools import pairwise

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from kserve_server import free_port, running
from oarsmith.errors import ConfigError
from oarsmith.serve.keys import Keys, new_key
from oarsmith.serve.kserve import messages
from oarsmith.serve.kserve.grpc_server import serve_grpc
from oarsmith.serve.service import Limits

pytestmark = pytest.mark.usefixtures("few_threads")

TEXT = "zqxjkvbwZQXJKVBW0123456789#%@~^&$!?=|+*"
LONG = 4000


@pytest.fixture(scope="module")
def server(chain_model):
    limits = Limits(max_new_tokens=LONG)
    model = chain_model(TEXT, max_position_embeddings=8192)
    with running(model, limits=limits, num_threads=1, batch_size=4, num_pages=400, block_size=16) as found:
        yield found


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.grpc) as found:
        yield found


def tensor(request):
    found = triton.InferInput("IN", [1], "BYTES")
    text = request if isinstance(request, str) else json.dumps([request])
    found.set_data_from_numpy(np.array([text], dtype=np.object_))
    return found


def native(result):
    [reply] = json.loads(result.as_numpy("OUT")[0])
    return reply


class Replies:
    """Takes what a stream brings; on a thread of the client's."""

    def __init__(self):
        self.found = queue.Queue()

    def __call__(self, result, error):
        self.found.put((result, error))

    def next(self):
        return self.found.get(timeout=30)

    def until_last(self):
        """The native replies to the one request of a stream."""
        replies = []
        while True:
            result, error = self.next()
            assert error is None, error
            replies.append(native(result))
            assert result.get_response().parameters["triton_final_response"].bool_param == replies[-1].get("is_end", 0)
            if replies[-1].get("is_end"):
                return replies


def test_health_and_metadata(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("model") and client.is_model_ready("tiny", "1")
    assert client.get_server_metadata().name == "oarsmith"
    metadata = client.get_model_metadata("tiny", as_json=True)
    assert metadata["inputs"] == [{"name": "IN", "datatype": "BYTES", "shape": ["1"]}]
    config = client.get_model_config("model").config
    assert config.model_transaction_policy.decoupled
    assert config.backend == "oarsmith"
    assert [(row.name, row.data_type, list(row.dims)) for row in (*config.input, *config.output)] == [
        ("IN", 13, [1]),
        ("OUT", 13, [1]),
    ]
    assert {row.name for row in client.get_model_repository_index().models} == {"tiny", "model"}
    for name, version in (("another", ""), ("tiny", "2"), ("", "")):
        with pytest.raises(InferenceServerException) as raised:
            client.is_model_ready(name, version)
        assert raised.value.status() == "StatusCode.NOT_FOUND"


def test_messages_have_the_numbers_of_triton():
    """Every field of ours is a field of Triton's own description, of the same kind."""
    from tritonclient.grpc import model_config_pb2

    def compare(ours, theirs):
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            kind = (field.number, field.is_repeated)
            assert kind == (other.number, other.is_repeated), field.full_name
            # Enumerations and whole numbers look alike on the wire.
            assert field.type == other.type or (field.type, other.type) == (5, 14), field.full_name
            if field.message_type is not None:
                assert field.message_type.full_name == other.message_type.full_name
                compare(field.message_type, other.message_type)

    for name in (name for name in messages._MESSAGES if "." not in name):
        theirs = {
            **service_pb2.DESCRIPTOR.message_types_by_name,
            **model_config_pb2.DESCRIPTOR.message_types_by_name,
        }
        compare(messages.message(name).DESCRIPTOR, theirs[name])


def test_infer(client):
    request = {"text": "count", "topp": 0.0, "return_usage": True}
    result = client.infer("model", [tensor(request)], request_id="5", outputs=[triton.InferRequestedOutput("OUT")])
    reply = native(result)
    assert (reply["result"], reply["req_id"], result.get_response().id) == (TEXT, "5", "5")
    assert reply["usage"]["completion_tokens"] > 20


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        ("no JSON", "INVALID_ARGUMENT", "not valid JSON"),
        ({"text": 5}, "INVALID_ARGUMENT", "text: Input should be a valid string"),
        ({"text": "a", "stream": True}, "INVALID_ARGUMENT", "ModelStreamInfer"),
        ({"text": "a", "model": "another"}, "NOT_FOUND", "there is no model"),
        ({"text": "count", "topp": 0, "timeout": 1e-6}, "DEADLINE_EXCEEDED", "more than 1e-06 seconds"),
    ],
)
def test_what_infer_refuses(client, request_, code, message):
    with pytest.raises(InferenceServerException, match=message) as raised:
        client.infer("model", [tensor(request_)])
    assert raised.value.status() == f"StatusCode.{code}"


def raw_request(**changes):
    request = service_pb2.ModelInferRequest(model_name="model", id="9")
    request.inputs.add(name="IN", datatype="BYTES", shape=[1])
    request.inputs[0].contents.bytes_contents.append(b'{"text": "a", "topp": 0}')
    for name, value in changes.items():
        if name == "contents":
            request.inputs[0].contents.Clear()
            request.inputs[0].contents.bytes_contents.extend(value)
        elif name == "raw":
            request.raw_input_contents.extend(value)
        elif name == "shape":
            request.inputs[0].shape[:] = value
        elif name == "parameter":
            request.parameters[value].int64_param = 1
        elif name == "no_inputs":
            request.inputs.clear()
        elif name == "output":
            request.outputs.add(name=value)
        else:
            setattr(request.inputs[0], name, value)
    return request


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_inputs": True}, "0 inputs"),
        ({"name": "OTHER"}, "there is no input"),
        ({"datatype": "FP32"}, "must be BYTES"),
        ({"shape": [1, 2]}, "one element"),
        ({"shape": []}, "one element"),
        ({"contents": []}, "one element"),
        ({"contents": [b"a", b"b"]}, "one element"),
        ({"contents": [b"\xff"]}, "not UTF-8"),
        ({"raw": [b"a"]}, "in raw_input_contents or in bytes_contents"),
        ({"contents": [], "raw": [b"abc"]}, "3 bytes are no tensor"),
        ({"contents": [], "raw": [b"\5\0\0\0abc"]}, "7 bytes are no tensor"),
        ({"contents": [], "raw": [b"\xff\xff\xff\xffabc"]}, "7 bytes are no tensor"),
        ({"parameter": "sequence_id"}, "parameters.sequence_id"),
        ({"output": "OTHER"}, "there is no output"),
    ],
)
def test_tensors_that_are_no_request(server, changes, message):
    """One call is refused; in a stream that request alone is, and the stream goes on."""
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(raw_request(**changes))
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert message in raised.value.details()
        good = raw_request()
        good.id = "good"
        answers = list(stub.ModelStreamInfer(iter((raw_request(**changes), good))))
        [wrong] = [answer for answer in answers if answer.error_message]
        assert message in wrong.error_message
        assert wrong.infer_response.id == "9"
        assert [a.infer_response.id for a in answers if not a.error_message][-1] == "good"


def test_bytes_that_are_no_message(server):
    with grpc.insecure_channel(server.grpc) as channel:
        for name in ("ModelInfer", "ServerLive", "RepositoryIndex"):
            with pytest.raises(grpc.RpcError) as raised:
                channel.unary_unary(f"/inference.GRPCInferenceService/{name}")(b"\xff\xff\xff")
            assert "/" not in raised.value.details()
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\0" * (17 << 20))
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/inference.GRPCInferenceService/ModelStatistics")(b"")
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
    with triton.InferenceServerClient(server.grpc) as client:
        assert client.is_server_ready()


def test_a_stream(server, client):
    replies = Replies()
    client.start_stream(replies)
    request = {"text": "count", "topp": 0, "req_id": "s", "infer_seed": 3}
    client.async_stream_infer("model", [tensor(request)], request_id="s", enable_empty_final_response=True)
    *parts, last = replies.until_last()
    assert len(parts) > 20
    assert "".join(part["token"] for part in (*parts, last)) == last["tokens_all"] == TEXT
    assert [part["send_idx"] for part in (*parts, last)] == list(range(len(parts) + 1))
    assert [part["tokens_all_num"] for part in parts] == list(range(1, len(parts) + 1))
    for part in parts:
        assert (part["is_end"], len(part["token_ids"]), part["error_code"]) == (0, 1, 0)
        assert (part["infer_seed"], part["req_id"], part["error_msg"]) == (3, "s", "")
    assert last["is_end"] == 1 and last["token_ids"] == []
    ids = [token for part in parts for token in part["token_ids"]]
    assert last["tokens_all_ids"] == ids
    assert server.service.tokenizer.decode(ids) == TEXT
    assert last["usage"]["completion_tokens"] == last["tokens_all_num"] == len(ids) + 1
    # In one piece at the end; and without a stream.
    client.async_stream_infer("model", [tensor({**request, "return_all_tokens": True})])
    [reply] = replies.until_last()
    assert (reply["token"], reply["token_ids"]) == (TEXT, ids)
    client.async_stream_infer("model", [tensor({**request, "stream": False})])
    [reply] = replies.until_last()
    assert reply["result"] == TEXT
    client.stop_stream()


def test_errors_in_a_stream_are_in_the_output(client):
    replies = Replies()
    client.start_stream(replies)
    for request, message in (
        ("no JSON", "not valid JSON"),
        ({"text": "a", "more": 1, "req_id": "mine"}, "more: there is no such field"),
        ({"text": "a", "max_dec_len": LONG + 1, "req_id": "mine"}, "over the limit"),
        ({"input_ids": [99999], "req_id": "mine"}, "outside the model's vocabulary"),
    ):
        client.async_stream_infer("model", [tensor(request)], request_id="outer")
        [reply] = replies.until_last()
        assert message in reply["error_msg"]
        assert (reply["error_code"], reply["req_id"]) == (400, "outer" if request == "no JSON" else "mine")
    client.async_stream_infer("another", [tensor({"text": "a"})], request_id="outer")
    result, error = replies.next()
    assert result is None and "there is no model" in error.message()
    client.stop_stream()


def test_twenty_requests_on_one_stream_at_once(server, client):
    """Each begins at another place of the model's text and gets what follows there, and nothing of the others."""
    tokenizer, replies = server.service.tokenizer, Replies()
    path = tokenizer.encode(TEXT)
    starts = range(len(path) - 1)
    assert len(starts) >= 20
    client.start_stream(replies)
    for start in starts:
        request = {"input_ids": path[: start + 1], "topp": 0, "req_id": f"from {start}"}
        client.async_stream_infer("model", [tensor(request)], request_id=str(start))
    tokens, order, ended = {str(start): [] for start in starts}, [], set()
    while len(ended) < len(starts):
        result, error = replies.next()
        assert error is None
        name, reply = result.get_response().id, native(result)
        assert reply["req_id"] == f"from {name}" and name not in ended
        tokens[name] += reply["token_ids"]
        order.append(name)
        if reply["is_end"]:
            ended.add(name)
            assert reply["tokens_all"] == tokenizer.decode(path)[len(tokenizer.decode(path[: int(name) + 1])) :]
    for start in starts:
        assert tokens[str(start)] == path[start + 1 :]
    # Not one after the other.
    assert sum(before != after for before, after in pairwise(order)) > 2 * len(starts)
    client.stop_stream()
    server.wait_idle()


@pytest.fixture(scope="module")
def endless(chain_model):
    """A model that never ends, with as much room as it takes a while to fill."""
    model = chain_model("one two three", end=False, max_position_embeddings=8192)
    limits = Limits(max_new_tokens=LONG)
    with running(
        model, limits=limits, num_threads=1, batch_size=2, max_waiting=1, num_pages=800, block_size=16
    ) as found:
        yield found


def test_cancel_in_mid_stream_frees_pages(endless):
    free, replies = endless.free_pages(), Replies()
    with triton.InferenceServerClient(endless.grpc) as client:
        client.start_stream(replies)
        for name in "ab":
            client.async_stream_infer("model", [tensor({"text": "count", "topp": 0, "req_id": name})])
        seen = [native(replies.next()[0])["req_id"] for _ in range(40)]
        assert set(seen) == {"a", "b"}
        assert endless.free_pages() < free
        client.stop_stream(cancel_requests=True)
        endless.wait_idle(10)
        assert endless.free_pages() == free
        # Their names may be used again.
        client.start_stream(replies := Replies())
        client.async_stream_infer("model", [tensor({"text": "a", "max_dec_len": 3, "topp": 0, "req_id": "a"})])
        assert len(replies.until_last()) == 3
        client.stop_stream()


def test_a_call_that_is_cancelled_frees_pages(endless):
    free = endless.free_pages()
    with triton.InferenceServerClient(endless.grpc) as client:
        with pytest.raises(InferenceServerException):
            client.infer("model", [tensor({"text": "count", "topp": 0})], client_timeout=0.3)
        endless.wait_idle(10)
    assert endless.free_pages() == free


def test_names_that_are_taken_and_a_queue_that_is_full(endless):
    with triton.InferenceServerClient(endless.grpc) as client:
        client.start_stream(replies := Replies())
        for name in "abc":
            client.async_stream_infer("model", [tensor({"text": "count", "topp": 0, "req_id": name})])
        while endless.service.worker.num_open < 3:
            time.sleep(0.01)
        assert client.is_server_live() and not client.is_server_ready() and not client.is_model_ready("model")
        for request, message, code in (
            ({"text": "a", "req_id": "a"}, "not finished yet", 400),
            ({"text": "a", "req_id": "d"}, "as many as may be", 500),
        ):
            client.async_stream_infer("model", [tensor(request)], request_id="wrong")
            while (found := replies.next()[0]).get_response().id != "wrong":
                pass
            assert message in native(found)["error_msg"]
            assert native(found)["error_code"] == code
        with pytest.raises(InferenceServerException, match="as many as may be") as raised:
            client.infer("model", [tensor({"text": "a"})])
        assert raised.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        client.stop_stream(cancel_requests=True)
    endless.wait_idle()


@pytest.fixture
def locked(chain_model, tmp_path):
    """A client of a server with keys, and two of them: the second one may ask twice a minute."""
    found = [new_key("free"), new_key("few")]
    (tmp_path / "keys").write_text(f"{found[0][1]}\n{found[1][1]} requests_per_minute=2\n")
    with (
        running(chain_model("one two"), keys=Keys(tmp_path / "keys"), num_threads=1) as server,
        triton.InferenceServerClient(server.grpc) as client,
    ):
        yield client, [{"authorization": f"Bearer {key}"} for key, _ in found]


def test_keys(locked):
    client, (free, _) = locked
    assert client.is_server_ready() and client.is_model_ready("model")
    request = [tensor({"text": "a", "topp": 0})]
    wrong = ({"authorization": "Bearer wrong"}, {"authorization": free["authorization"].split()[1]}, {})
    for headers in wrong:
        for call in (
            lambda headers=headers: client.infer("model", request, headers=headers),
            lambda headers=headers: client.get_model_metadata("model", headers=headers),
        ):
            with pytest.raises(InferenceServerException, match="API key") as raised:
                call()
            assert raised.value.status() == "StatusCode.UNAUTHENTICATED"
    assert native(client.infer("model", request, headers=free))["result"] == "one two"
    client.start_stream(replies := Replies(), headers=free)
    client.async_stream_infer("model", request)
    assert replies.until_last()[-1]["tokens_all"] == "one two"
    client.stop_stream()
    client.start_stream(replies := Replies())
    assert "no API key" in replies.next()[1].message()


def test_requests_of_a_key_are_counted(locked):
    """Those of a stream one by one; looking around costs nothing."""
    client, (_, few) = locked
    request = [tensor({"text": "a", "topp": 0})]
    for _ in range(3):
        assert client.get_model_metadata("model", headers=few)
    client.start_stream(replies := Replies(), headers=few)
    for _ in range(2):
        client.async_stream_infer("model", request)
        assert replies.until_last()[-1]["tokens_all"] == "one two"
    client.async_stream_infer("model", request)
    [refused] = replies.until_last()
    assert "may ask 2 times a minute" in refused["error_msg"]
    client.stop_stream()
    with pytest.raises(InferenceServerException, match="times a minute") as raised:
        client.infer("model", request, headers=few)
    assert raised.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_a_port_that_is_taken_and_files_that_are_not_there(server, tmp_path):
    port = int(server.grpc.rpartition(":")[2])
    with pytest.raises(ConfigError, match="cannot be had"):
        server.call(serve_grpc(server.service, port=port))
    with pytest.raises(ConfigError, match="cannot be read"):
        server.call(serve_grpc(server.service, port=free_port(), tls=(tmp_path / "a", tmp_path / "b")))


def test_tls(server, tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*words, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    port = free_port()
    started = server.call(serve_grpc(server.service, port=port, tls=(certificate, key)))
    with triton.InferenceServerClient(f"localhost:{port}", ssl=True, root_certificates=str(certificate)) as client:
        assert client.is_server_live()
        assert native(client.infer("model", [tensor({"text": "a", "topp": 0})]))["result"] == TEXT
    server.call(started.stop(0))
