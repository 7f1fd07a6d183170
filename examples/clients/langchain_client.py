"""LangChain: a prompt, the model and a parser in a chain, streamed.

    pip install langchain-openai
    python examples/clients/langchain_client.py "Why is the sky blue?"

OARSMITH_URL: where the server is (http://127.0.0.1:8011); OARSMITH_API_KEY: a key, if it wants one.
"""

import os
import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

question = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
url = os.environ.get("OARSMITH_URL", "http://127.0.0.1:8011")
# The server takes the name "" for its model; LangChain wants one.
model = ChatOpenAI(
    base_url=f"{url}/v1",
    api_key=os.environ.get("OARSMITH_API_KEY", "none"),
    model=os.environ.get("OARSMITH_MODEL", ""),
    max_tokens=64,
)
prompt = ChatPromptTemplate.from_messages([("system", "Answer in one sentence."), ("user", "{question}")])
for piece in (prompt | model | StrOutputParser()).stream({"question": question}):
    print(piece, end="", flush=True)
print()
