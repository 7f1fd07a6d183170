"""Triton's client: a streamed answer over gRPC, or one in a piece over HTTP. Requests as PaddleNLP's server took them.

    pip install 'tritonclient[grpc,http]'
    python examples/clients/triton_client.py "Why is the sky blue?"

OARSMITH_GRPC: host and port of gRPC, if the server has it (--grpc_port 8811): then the answer is streamed. Else
OARSMITH_URL: where the server is (http://127.0.0.1:8011). OARSMITH_API_KEY: a key, if it wants one.
"""

import json
import os
import queue
import sys

import numpy as np

request = {"text": sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?", "max_dec_len": 64}
headers = {"authorization": f"Bearer {os.environ['OARSMITH_API_KEY']}"} if "OARSMITH_API_KEY" in os.environ else {}


def tensor(module, request):
    """The tensor IN: a list of one request, as JSON."""
    found = module.InferInput("IN", [1], "BYTES")
    found.set_data_from_numpy(np.array([json.dumps([request]).encode()], dtype=np.object_))
    return found


def over_grpc(place):
    import tritonclient.grpc as triton

    replies = queue.Queue()
    with triton.InferenceServerClient(place) as client:
        client.start_stream(lambda result, error: replies.put((result, error)), headers=headers)
        client.async_stream_infer("model", [tensor(triton, {**request, "stream": True})])
        while True:
            result, error = replies.get()
            if error is not None:
                raise error
            reply = json.loads(result.as_numpy("OUT")[0])[0]
            if reply["error_msg"]:
                raise SystemExit(reply["error_msg"])
            print(reply["token"], end="", flush=True)
            if reply["is_end"]:
                return print()


def over_http(url):
    import tritonclient.http as triton

    scheme, _, place = url.partition("://")
    client = triton.InferenceServerClient(place, ssl=scheme == "https", network_timeout=600)
    result = client.infer("model", [tensor(triton, request)], headers=headers)
    print(json.loads(result.as_numpy("OUT")[0])[0]["result"])


if "OARSMITH_GRPC" in os.environ:
    over_grpc(os.environ["OARSMITH_GRPC"])
else:
    over_http(os.environ.get("OARSMITH_URL", "http://127.0.0.1:8011"))
