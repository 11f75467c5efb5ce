#!/bin/sh
# Purify model.pt with the clean samples in clean.npz; leave model-clean.pt beside them.
#   URL=http://127.0.0.1:8000 TOKEN=ww_… sh sanitise.sh        (without tokens: TOKEN=)
set -eu; A="Authorization: Bearer $TOKEN"; C="curl -sS --fail-with-body"
JOB=$($C -H "$A" -H 'Accept: text/plain' -F model=@model.pt -F samples=@clean.npz -F architecture=resnet18_cifar "$URL/jobs") || { echo "$JOB" >&2; exit 1; }
curl -sSf -H "$A" --retry 999 --retry-max-time 3600 -o model-clean.pt "$JOB/model" || { $C -H "$A" "$JOB/model"; exit 1; }
$C -H "$A" "$JOB/model.sha256" | sha256sum -c -
