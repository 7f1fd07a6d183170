"""The command with every protocol, keys, TLS and adapters together."""

import json
import ssl
import subprocess
import time

import grpc
import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton

from kserve_server import free_port
from oarsmith.serve.keys import new_key
from random_adapter import make_adapter
from server_process import server_process


@pytest.fixture
def certificate(tmp_path):
    """A key and a certificate for 127.0.0.1."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-keyout", key, "-out", certificate, "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run([*words, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return certificate, key


def test_tls_keys_adapters_and_grpc(chain_model, tmp_path, certificate):
    base = chain_model("one two three")
    adapter = make_adapter(base, tmp_path / "adapter")
    key, line = new_key("anna")
    (tmp_path / "keys").write_text(line)
    port = free_port()
    words = ["--tls_certfile", certificate[0], "--tls_keyfile", certificate[1], "--api_keys", tmp_path / "keys"]
    words += ["--adapters", f"other={adapter}", "--grpc_port", port, "--served_model_name", "plain"]
    with server_process(base, *words) as (_, url, lines):
        assert url.startswith("https://") and f"gRPC on port {port}" in "".join(lines)
        trusted = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(verify=trusted) as web:
            assert web.get(f"{url}/v1/models").status_code == 401
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=web, max_retries=0)
            assert [model.id for model in client.models.list()] == ["plain", "other"]

            def said(model):
                answer = client.completions.create(model=model, prompt=[5, 6, 7], max_tokens=8, temperature=0)
                return answer.choices[0].text

            plain, other = said("plain"), said("other")
        assert plain != other
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        options = {"ssl": True, "root_certificates": str(certificate[0])}
        with triton.InferenceServerClient(f"127.0.0.1:{port}", **options) as client:
            given = triton.InferInput("IN", [1], "BYTES")
            request = {"input_ids": [5, 6, 7], "topp": 0, "max_dec_len": 8, "req_id": "1"}
            given.set_data_from_numpy(np.array([json.dumps([request])], dtype=np.object_))
            answer = client.infer("other", [given], headers={"authorization": f"Bearer {key}"})
            [reply] = json.loads(answer.as_numpy("OUT")[0])
            assert reply["result"] == other
            with pytest.raises(triton.InferenceServerException) as refused:
                client.infer("other", [given])
            for _ in range(200):  # the log comes through a pipe
                told = [json.loads(line) for line in lines if '"gRPC"' in line]
                if len(told) == 2:
                    break
                time.sleep(0.05)
            assert [line["status"] for line in told] == [200, 401] and told[0]["generated_tokens"] > 0
            assert told[0]["key"] == "anna" and told[0]["client"] == "127.0.0.1"
            assert refused.value.status() == str(grpc.StatusCode.UNAUTHENTICATED)
