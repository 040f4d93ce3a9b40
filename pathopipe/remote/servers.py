"""Clients of buckets, and what their errors mean.

Clients are obstore's, imported when the first object is asked for; they read the usual variables of the environment
(``AWS_*``, ``GOOGLE_*``, ``AZURE_*``) themselves.
"""

import contextlib
import errno
import functools
import io
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from pathopipe.errors import UsageError

__all__ = ["URL", "bucket_client", "explained", "load_obstore", "split_url"]

URL: Final = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_RIGHTS: Final = (
    "the keys need the rights to list, get, put and delete objects there (on S3: s3:ListBucket, s3:GetObject, "
    "s3:PutObject, s3:DeleteObject)"
)
# Asked where the environment holds no keys: those of a machine in the cloud.
_KEY_SERVERS: Final = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
_VARIABLES: Final = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def split_url(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and key.

    Raises:
        ValueError: It is no URL.
    """
    parts = URL.fullmatch(url)
    if parts is None:
        raise ValueError(f"{url}: not below a bucket")
    bucket, _, key = parts[2].partition("/")
    return parts[1], bucket, key


@contextlib.contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turn errors of a client into OSErrors that say what the server said, and no more of its answer.

    Raises:
        FileNotFoundError: There is no such object.
        UsageError: There is no such bucket.
        io.UnsupportedOperation: The server does not do that.
        PermissionError: No rights, or no keys.
        OSError: Anything else: no connection, the server failed.
    """
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
            raise _no_bucket(path) from None
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from None
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise
        text = str(error)
        if "NoSuchBucket" in text or "ContainerNotFound" in text:
            raise _no_bucket(path) from None
        if any(host in text for host in _KEY_SERVERS):
            keys = _VARIABLES.get(split_url(str(path))[0], "the keys")
            raise PermissionError(errno.EACCES, f"no keys were found: set {keys}", str(path)) from None
        kind = type(error).__name__
        code, reason = errno.EIO, _reason(text)
        if kind in ("PermissionDeniedError", "UnauthenticatedError") or re.search(r"\b(401|403) [A-Z]", text):
            raise PermissionError(errno.EACCES, f"{reason}: {_RIGHTS}", str(path)) from None
        if kind == "NotSupportedError":
            raise io.UnsupportedOperation(f"{path}: {reason}") from None
        if kind == "PreconditionError":
            code, reason = errno.ESTALE, "the object was changed meanwhile"
        raise OSError(code, reason, str(path)) from None


def _no_bucket(path: Path | str) -> UsageError:
    scheme, bucket, _ = split_url(str(path))
    return UsageError(f"{path}: there is no bucket '{bucket}'; check the name and {_VARIABLES.get(scheme, 'the host')}")


def _reason(text: str) -> str:
    """What a server or a client said, without requests, keys and signatures."""
    code = re.search(r"<Code>([^<]*)</Code>", text)
    message = re.search(r"<Message>([^<]*)</Message>", text)
    if code is not None:
        return f"the server says {code[1]}" + (f", '{message[1].strip()}'" if message is not None else "")
    status = re.search(r"non-2xx status code: (\d{3} [A-Za-z ]*[A-Za-z])", text)
    if status is not None:
        return f"the server says {status[1]}"
    if "redirect without LOCATION" in text:
        return "the bucket is in another region: set AWS_REGION"
    if "timed out" in text or "Timeout" in text or "TimedOut" in text:
        return "no answer in time"
    if "onnect" in text or "error sending request" in text:
        return "no connection: check the network, the host and AWS_ENDPOINT_URL"
    return " ".join(text.partition("Debug source")[0].split())[:200]


def load_obstore() -> Any:
    """The library, with the parts of it that are used."""
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise UsageError("URLs need obstore; pip install 'pathopipe[s3]'") from None
    return obstore


@functools.cache
def bucket_client(scheme: str, bucket: str, hasty: bool = False) -> Any:
    """Obstore's client of a bucket.

    Args:
        scheme: What kind.
        bucket: Its name; the host of web servers.
        hasty: Give up in seconds, not minutes.
    """
    obstore = load_obstore()
    if scheme == "memory":
        return _memory(bucket)
    client: Any = {"connect_timeout": "5s", "timeout": "10s" if hasty else "300s", "user_agent": "pathopipe"}
    tries: Any = {"max_retries": 1 if hasty else 10, "retry_timeout": timedelta(seconds=10 if hasty else 180)}
    if scheme in ("http", "s3"):  # of S3, where whoever set AWS_ENDPOINT_URL chose it
        client["allow_http"] = True
    try:
        if scheme in ("http", "https"):
            return obstore.store.HTTPStore.from_url(f"{scheme}://{bucket}", client_options=client, retry_config=tries)
        makers: Any = {"s3": obstore.store.S3Store, "gs": obstore.store.GCSStore, "az": obstore.store.AzureStore}
        return makers[scheme](bucket, client_options=client, retry_config=tries)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise UsageError(
            f"{scheme}://{bucket}: can't be opened ({_reason(str(error))}); check {_VARIABLES.get(scheme, 'the host')}"
        ) from None


@functools.cache
def _memory(bucket: str) -> Any:
    """A bucket that lives as long as this process."""
    return load_obstore().store.MemoryStore()
