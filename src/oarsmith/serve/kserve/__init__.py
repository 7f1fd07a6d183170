"""KServe's protocol, version 2, with Triton's extensions; requests are those of PaddleNLP's server."""
