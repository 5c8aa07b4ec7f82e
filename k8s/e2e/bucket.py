"""Make an empty bucket in moto's S3 server. Runs in its pod with nothing but Python: `python - ENDPOINT BUCKET`.

Everything that the server holds is forgotten: a run of e2e must do its work, not find that of an earlier one.
"""

import sys
import urllib.request


def main(endpoint, bucket):
    for method, path in (("POST", "moto-api/reset"), ("PUT", bucket)):
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{path}", method=method), timeout=30).close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
