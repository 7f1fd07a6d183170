"""The openai package: a streamed chat.

    pip install openai
    python examples/clients/openai_client.py "Why is the sky blue?"

OARSMITH_URL: where the server is (http://127.0.0.1:8011); OARSMITH_API_KEY: a key, if it wants one.
"""

import os
import sys

from openai import OpenAI

question = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
url = os.environ.get("OARSMITH_URL", "http://127.0.0.1:8011")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OARSMITH_API_KEY", "none"))
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    max_tokens=64,
    temperature=0.7,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
    if chunk.usage:
        print(f"\n[{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out]")
