"""Values as people write them: numbers of the schema, sizes such as `2GB`, and paths that mean what they say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction as Exact
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

LARGEST = 10**18  # tokens or bytes: more is a slip of the keyboard
LARGEST_COUNT = 10**6  # layers, experts, widths, ranks
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,20})?)\s*%|([0-9]{1,18})\s*/\s*([0-9]{1,18})")
_SIZE = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kmgt]?i?)b", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """Marks a setting that names a folder or file (places.py). `below_root`: a relative one is below the storage root."""

    below_root: bool = False


def parse_size(value: object) -> object:
    """`2GB`, `1.5 GiB`, `64MiB`, `500 kB` -> bytes. What is no text stays as it is. Raises ValueError for other text."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None or found.group(2).lower() not in UNITS:
        raise ValueError(f"{value[:40]!r} is no size; write bytes as a number, or 2GB, 64MiB, 500kB")
    return round(float(found.group(1).replace("_", "")) * UNITS[found.group(2).lower()])


def parse_share(value: object, total: int) -> int:
    """Tokens of a share of the run: `80%`, or `1/12` where a share has no short decimals. Raises ValueError for anything else."""
    text = value.strip() if isinstance(value, str) else ""
    found = _SHARE.fullmatch(text)
    share = None
    if found and found.group(1):
        share = Exact(found.group(1)) / 100
    elif found and int(found.group(3)):
        share = Exact(int(found.group(2)), int(found.group(3)))
    if share is None or not 0 < share <= 1:
        raise ValueError(f"until {value!r} must be a share of the run above 0, like 80% or 1/12, at most 100%")
    return max(1, round(share * total))


def _plain_location(uri: str) -> str:
    """Nobody expands `$VAR` here, and `s3:/bucket` would be a folder of that name. Credentials are not repeated in the message:
    URIs are printed, logged and recorded."""
    if "@" in uri.partition("://")[2].partition("/")[0]:
        raise ValueError(
            "must not hold credentials; give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or by a role"
        )
    if not uri.strip() or uri != uri.strip() or not uri.isprintable():
        raise ValueError(f"{uri[:80]!r} must be a path or URI without blanks around it")
    if "$" in uri:
        raise ValueError(f"{uri!r} holds a variable, which nothing here expands; write the path out")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/(?!/)", uri):
        raise ValueError(f"{uri!r} has one slash after the colon; a URI has two, like s3://bucket/prefix")
    if uri.startswith("~") and not (uri == "~" or uri.startswith("~/")):
        raise ValueError(f"{uri!r}: only ~/ (your own home) is understood; write the path out")
    return uri


def _folder_or_bucket(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    if separator and (scheme != "s3" or not re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*(/|$)", rest)):
        raise ValueError(f"{uri!r} must be a folder or s3://bucket/prefix")
    return uri


def _http(uri: str) -> str:
    if not re.fullmatch(r"https?://[^/\s:]+(:[0-9]{1,5})?(/.*)?", uri):
        raise ValueError(f"{uri!r} must be http://server:port or https://server")
    return uri


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
Count = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Bytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=LARGEST)]
Uri = Annotated[str, AfterValidator(_plain_location)]
Location = Annotated[Uri, AfterValidator(_folder_or_bucket), Place()]  # of storage and of what is read
OwnLocation = Annotated[Uri, AfterValidator(_folder_or_bucket), Place(below_root=True)]
Endpoint = Annotated[Uri, AfterValidator(_http)]
