#!/usr/bin/env bash
# Version: s3fs 2026.9.0, fsspec 2026.9.0 (moto 5.2.5 as the server)
# Behaviour: `with fs.open(path, "wb") as file:` completes the object when the block raises, with what had been written until then: the
#   truncated object replaces the one that was there, and looks like any other. Python's own `open` does so, too, but on S3 an upload
#   that is not completed leaves no trace, and one expects it to be dropped. `file.discard()` alone does not help, since leaving the block
#   closes the file once more, and that raises another error in place of the first.
# Seen: after an error in the block: 6000000 of 12000000 bytes are the object; after discard() inside the block: AttributeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "s3fs==2026.9.0" "fsspec==2026.9.0" "moto[server]==5.2.5" "aiobotocore==3.10.0" "boto3==1.43.117"
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
fs = s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False)
fs.pipe_file("bucket/whole", b"a" * 12_000_000)
try:
    with fs.open("bucket/whole", "wb", block_size=5 * 2**20) as file:
        file.write(b"b" * 6_000_000)
        raise KeyError("the program fails half-way")
except KeyError:
    pass
size = fs.info("bucket/whole", refresh=True)["size"]
raised = "nothing"
try:
    with fs.open("bucket/other", "wb", block_size=5 * 2**20) as file:
        try:
            file.write(b"b" * 6_000_000)
            raise KeyError("the program fails half-way")
        except KeyError:
            file.discard()
            raise
except Exception as error:
    raised = type(error).__name__
server.stop()
print(f"after an error in the block: {size} of 12000000 bytes are the object; after discard() inside the block: {raised}")
assert size == 6_000_000 and raised != "KeyError", "this has changed"
EOF
