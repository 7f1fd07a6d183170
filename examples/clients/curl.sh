#!/usr/bin/env bash
# Nothing but curl: is it ready, which models, a whole answer, a streamed one.
#
#   examples/clients/curl.sh ["a question"]
#
# OARSMITH_URL: where the server is (http://127.0.0.1:8011); OARSMITH_API_KEY: a key, if it wants one.
set -euo pipefail

url=${OARSMITH_URL:-http://127.0.0.1:8011}
question=${1:-Why is the sky blue?}
ask=(curl --fail-with-body --silent --show-error --no-buffer -H 'Content-Type: application/json' -H "Authorization: Bearer ${OARSMITH_API_KEY:-none}")
# Quotes and backslashes of the question, as JSON has them.
text=${question//\\/\\\\}
text=${text//\"/\\\"}

"${ask[@]}" "$url/ready"; echo
"${ask[@]}" "$url/v1/models"; echo
"${ask[@]}" "$url/v1/chat/completions" -d "{\"messages\": [{\"role\": \"user\", \"content\": \"$text\"}], \"max_tokens\": 64}"; echo
"${ask[@]}" "$url/v1/chat/completions" \
    -d "{\"messages\": [{\"role\": \"user\", \"content\": \"$text\"}], \"max_tokens\": 64, \"stream\": true}"
