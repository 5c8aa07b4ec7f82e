"""Does a server answer, and are there credentials: asked once, with a time limit, before a client tries ten times for minutes."""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit

from pipeline.config.schema import StorageConfig
from pipeline.storage import StorageError

PATIENCE_S = 5.0
PORTS = {"http": 80, "https": 443, "ray": 10001}


def answers(uri: str, key: str, remedy: str) -> None:
    """Raises StorageError if nothing takes a connection at the server of a URI (`scheme://host[:port]/...`) within `PATIENCE_S`."""
    parts = urlsplit(uri)
    try:
        socket.create_connection((parts.hostname or "", parts.port or PORTS[parts.scheme]), PATIENCE_S).close()
    except (OSError, ValueError, KeyError) as error:  # a port over 65535 is a ValueError, an unknown scheme a KeyError
        raise StorageError(f"{key} {uri}: nothing answers ({type(error).__name__}: {error}); give {remedy}") from None


def check_s3(config: StorageConfig) -> None:
    """Raises StorageError if there are no credentials for S3 or its server does not answer. Behind a proxy only the first is known."""
    import botocore.exceptions
    import botocore.session

    session = botocore.session.get_session()
    try:
        if session.get_credentials() is None:
            raise StorageError(
                "storage: there are no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
            )
        region = config.region or session.get_config_variable("region") or "us-east-1"
        client = session.create_client("s3", region_name=region, endpoint_url=config.endpoint_url)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"storage.endpoint_url or storage.region: {' '.join(str(error).split())}; correct it"
        ) from None
    if not urllib.request.getproxies():
        answers(
            client.meta.endpoint_url,
            "storage.endpoint_url",
            "the address of an S3 server (storage.region for one of AWS)",
        )
