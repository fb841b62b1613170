"""Addresses that carry a secret are refused: they would stand in configurations, records, manifests and reports."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

from megagpt.errors import DataError

SIGNING_KEYS = {
    "x-amz-signature",
    "x-amz-credential",
    "x-amz-security-token",
    "x-goog-signature",
    "signature",
    "sig",
    "token",
    "access_token",
    "api_key",
    "apikey",
    "key",
    "password",
    "secret",
}
"""Of an address's query, in lower case: what signed links of the clouds and of common file servers are signed with."""


def check_no_credentials(address: str, where: str) -> None:
    """Say that an address has a password or a signature in it, and where it belongs instead, without repeating it.

    Args:
        address: a path, or an address such as s3://bucket/folder.
        where: it was said.

    Raises:
        DataError: it carries a secret, or cannot be taken apart to see.
    """
    if "://" not in address:
        return
    scheme, _, rest = address.partition("://")
    try:
        parts = urlsplit(address)
        password, signed = parts.password, {key.lower() for key, _ in parse_qsl(parts.query)} & SIGNING_KEYS
    except ValueError:
        raise DataError(f"{where}: an address of {scheme}:// is malformed") from None
    if password is None and not signed:
        return
    found = "a password" if password is not None else f"a secret ({', '.join(sorted(signed))})"
    shown = f"{scheme}://...@{rest.rpartition('@')[2]}".partition("?")[0] if password else address.partition("?")[0]
    raise DataError(
        f"{where}: {shown} carries {found}, which would be written into records and reports; give it where fsspec "
        "looks for it: environment variables, the cloud's own credentials file, ~/.netrc, or a file in ~/.config/fsspec"
    )
