"""Is a published model in the bucket, whole? Runs in the S3 server's pod with nothing but Python: `python - ENDPOINT BUCKET ROOT`.

Reads <root>/models/*/latest.json, the manifest that it names, and compares the sha256 of every file. Exit code 0 means all is there.
"""

import hashlib
import json
import sys
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ET

SIGNED = {"Authorization": "AWS local:local"}  # the server wants a signature and takes any


def fetch(url):
    with urllib.request.urlopen(urllib.request.Request(url, headers=SIGNED), timeout=60) as response:
        return response.read()


def get(endpoint, path):
    return fetch(f"{endpoint}/{urllib.parse.quote(path)}")


def keys(endpoint, bucket, prefix):
    found, token = [], ""
    while True:
        query = urllib.parse.urlencode(
            {"list-type": "2", "prefix": prefix, **({"continuation-token": token} if token else {})}
        )
        tree = ET.fromstring(fetch(f"{endpoint}/{bucket}?{query}"))
        space = tree.tag[: tree.tag.index("}") + 1] if "}" in tree.tag else ""
        found += [node.text for node in tree.iter(f"{space}Key")]
        token = tree.findtext(f"{space}NextContinuationToken") or ""
        if not token:
            return found


def main(endpoint, bucket, root):
    names = keys(endpoint, bucket, f"{root}/models/")
    latest = [name for name in names if name.endswith("/latest.json")]
    if len(latest) != 1:
        return f"{len(latest)} promoted models below {bucket}/{root}/models"
    version = json.loads(get(endpoint, f"{bucket}/{latest[0]}"))["version"]
    folder = f"{latest[0].removesuffix('latest.json')}{version}"
    manifest = json.loads(get(endpoint, f"{bucket}/{folder}/manifest.json"))
    for entry in manifest["files"]:
        found = hashlib.sha256(get(endpoint, f"{bucket}/{folder}/{entry['path']}")).hexdigest()
        if found != entry["sha256"]:
            return f"{entry['path']}: sha256 is {found}, the manifest says {entry['sha256']}"
    print(
        f"published: {manifest['name']} {version}, {len(manifest['files'])} files, loss {manifest['loss']:.4f}, {manifest['bits_per_byte']:.4f} bits per byte, "
        f"started from {manifest['config']['training']['initial_weights'] or 'drawn weights'}"
    )
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
