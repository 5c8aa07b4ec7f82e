#!/usr/bin/env bash
# Version: s3fs 2026.9.0 (moto 5.2.5 as the server)
# Behaviour: of an object `d` beside `d/x`, `find("d")` shows `d/x` alone: it asks for keys that begin with `d/`, and looks at `d`
#   itself only if there are none. A single object is found by `find`, and a second one below it makes it vanish. With
#   `withdirs=True` the folder above shows `d` as a directory, without its size and etag. `rm(recursive=True)` deletes both,
#   so what was counted with `find` and what is deleted differ.
# Seen: find of p/d alone: ['bucket/p/d']; with p/d/x: ['bucket/p/d/x']; withdirs: directory; left after rm: []
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "s3fs==2026.9.0" "moto[server]==5.2.5" boto3
cd "$folder"
AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_DEFAULT_REGION=us-east-1 "$folder/venv/bin/python" - <<'EOF' || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
import logging

import boto3
import s3fs
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
endpoint = "http://%s:%d" % server.get_host_and_port()
client = boto3.client("s3", endpoint_url=endpoint)
client.create_bucket(Bucket="bucket")
client.put_object(Bucket="bucket", Key="p/d", Body=b"1")
fs = s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False)
alone = fs.find("bucket/p/d")
client.put_object(Bucket="bucket", Key="p/d/x", Body=b"1")
beside = fs.find("bucket/p/d")
kind = fs.find("bucket/p", detail=True, withdirs=True)["bucket/p/d"]["type"]
fs.rm("bucket/p/d", recursive=True)
left = [entry["Key"] for entry in client.list_objects_v2(Bucket="bucket").get("Contents", [])]
server.stop()
print(f"find of p/d alone: {alone}; with p/d/x: {beside}; withdirs: {kind}; left after rm: {left}")
assert (alone, beside, kind, left) == (["bucket/p/d"], ["bucket/p/d/x"], "directory", []), "this has changed"
EOF
