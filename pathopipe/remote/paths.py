"""Object storage as folders: paths that are URLs, taken wherever a path is taken."""

import contextlib
import errno
import fnmatch
import io
import os
import stat
import sys
import urllib.parse
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path, PosixPath, PurePosixPath
from typing import IO, Any, Final, Self

from pathopipe.errors import UsageError
from pathopipe.remote.servers import URL, bucket_client, explained, load_obstore, split_url

__all__ = ["Found", "RemotePath", "Version", "check_rights", "location"]

# A path that is taken for a local one by mistake fails on this character; it can't become a folder named "s3:".
_MARK: Final = "\0"
_SCHEMES: Final = ("s3", "gs", "az", "http", "https", "memory")
# One PUT is whole or absent and costs one request; beyond this a lost connection would cost too much.
_MULTIPART_BYTES: Final = 64 * 2**20
_PART_BYTES: Final = 16 * 2**20


def location(text: str | Path) -> Path:
    """A path: of an object where ``text`` is a URL, of a file else.

    Raises:
        UsageError: A URL of a kind that is not known, or one that holds a secret.
    """
    if isinstance(text, Path):
        return text
    url = URL.fullmatch(text)
    if url is None:
        return Path(text)
    scheme, rest = url.groups()
    if scheme == "file":
        return Path(f"/{rest.lstrip('/')}")
    if scheme not in _SCHEMES:
        raise UsageError(f"{scheme}://: no such kind of place; s3://, gs://, az://, https:// and http:// are known")
    host, _, key = rest.partition("/")
    if "@" in host or (scheme in ("http", "https") and any(sign in key for sign in "?#")):
        # What stands there would show in messages, logs and reports.
        raise UsageError(
            f"{scheme}://{host.rpartition('@')[2]}: a URL with a password or a signature is not taken; download the "
            "file, or give s3:// and the keys in the environment"
        )
    if scheme in ("http", "https"):
        text = f"{scheme}://{host}/{urllib.parse.unquote(key)}"
    if not host:
        raise UsageError(f"{text}: names no {'host' if scheme.startswith('http') else 'bucket'}")
    return RemotePath(text)


@dataclass(frozen=True, slots=True)
class Version:
    """Which of its contents an object had at some moment."""

    e_tag: str
    version: str | None = None

    @property
    def condition(self) -> dict[str, str]:
        """As obstore takes it."""
        return {"e_tag": self.e_tag, **({"version": self.version} if self.version is not None else {})}


@dataclass(frozen=True, slots=True)
class Found:
    """What a server says of an object."""

    size: int
    """Bytes."""
    modified_s: float
    """When it was last written, by the clock of the server."""
    version: Version | None
    """None where the server tells no contents apart."""


class RemotePath(PosixPath):
    """An object, or all objects whose names begin with this one and a slash, as a path.

    Takes the place of a ``Path`` in most that paths are used for. There are no folders: ``mkdir`` does nothing, and a
    folder is there while an object lies in it. What only the local file system can do is refused in words.
    """

    def __new__(cls, *segments: str | Path) -> Self:
        """A path below a bucket, as ``Path`` takes its parts."""
        return super().__new__(cls, *(_inner(segment) for segment in segments))

    def __init__(self, *segments: str | Path) -> None:
        if sys.version_info >= (3, 12):
            super().__init__(*(_inner(segment) for segment in segments))

    def __str__(self) -> str:
        inner = super().__str__()
        if not inner.startswith(f"/{_MARK}"):
            return inner
        scheme, _, rest = inner[2:].partition("/")
        return f"{scheme}//{rest}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self),)

    def __fspath__(self) -> str:
        raise UsageError(
            f"{self}: this takes a local file or folder, not a URL; give a local path, and copy from or to the bucket "
            "with its own tools"
        )

    @property
    def scheme(self) -> str:
        """``s3``, ``gs``, ``az``, ``https``, ``http``; ``memory`` for tests."""
        return self._place[0]

    @property
    def key(self) -> str:
        """Name of the object in its bucket."""
        return self._place[2]

    @property
    def _place(self) -> tuple[str, str, str]:
        """Scheme, bucket and key."""
        return split_url(str(self))

    @property
    def bucket_client(self) -> Any:
        """Obstore's client of the bucket, the same for all paths in it and for a whole process."""
        scheme, bucket, _ = self._place
        return bucket_client(scheme, bucket)

    # ---- where it is

    @property
    def parent(self) -> Self:
        """The folder it is in; a bucket is its own."""
        return super().parent if self.key else self

    def absolute(self) -> Self:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> Self:
        """Itself."""
        return self

    def expanduser(self) -> Self:
        """Itself."""
        return self

    def relative_to(self, other: Any, /, *more: Any, **how: Any) -> Any:  # type: ignore[override]
        """The way from a folder above to this; it is no URL."""
        above, here = str(RemotePath(other, *more)), str(self)
        if here == above:
            return PurePosixPath()
        if not here.startswith(f"{above}/"):
            raise ValueError(f"{self} is not below {above}")
        return PurePosixPath(here[len(above) + 1 :])

    # ---- what is there

    def exists(self, **how: Any) -> bool:
        """Whether there is an object of this name, or one below it."""
        return self.is_file() or self.is_dir()

    def is_file(self, **how: Any) -> bool:
        """Whether there is an object of this name."""
        return self.found() is not None

    def is_dir(self, **how: Any) -> bool:
        """Whether there is an object below this name."""
        if self.scheme in ("http", "https"):
            return False  # a web server does not list
        obstore = load_obstore()
        with contextlib.suppress(FileNotFoundError), explained(self):
            return any(obstore.list(self.bucket_client, prefix=self.key or None, chunk_size=1))
        return False

    def is_symlink(self) -> bool:
        """No."""
        return False

    def stat(self, **how: Any) -> os.stat_result:
        """Size and time of last change; FileNotFoundError where there is neither object nor folder."""
        found = self.found()
        if found is not None:
            size, changed = found.size, found.modified_s
            return os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, size, changed, changed, changed))
        if self.is_dir():
            return os.stat_result((stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        raise FileNotFoundError(errno.ENOENT, "no such object", str(self))

    def found(self, *, hasty: bool = False) -> Found | None:
        """What the server says of the object; None where there is none.

        Args:
            hasty: Give up in seconds, not minutes.
        """
        obstore = load_obstore()
        scheme, bucket, key = self._place
        if not key:
            return None
        with contextlib.suppress(FileNotFoundError), explained(self):
            said = obstore.head(bucket_client(scheme, bucket, hasty), key)
            tag = said["e_tag"]
            version = Version(tag, said["version"]) if tag is not None else None
            return Found(said["size"], said["last_modified"].timestamp(), version)
        return None

    def listing(self) -> tuple[list[str], list[str]]:
        """Names of the folders and of the objects right below, sorted."""
        obstore = load_obstore()
        with contextlib.suppress(FileNotFoundError), explained(self):
            found = obstore.list_with_delimiter(self.bucket_client, self.key or None)
            folders = sorted(PurePosixPath(prefix).name for prefix in found["common_prefixes"])
            return folders, sorted(PurePosixPath(each["path"]).name for each in found["objects"])
        return [], []

    def sizes_below(self) -> dict[str, int]:
        """Bytes of every object below, by its way from here; one request for each thousand of them."""
        obstore = load_obstore()
        start = len(self.key) + 1 if self.key else 0
        with contextlib.suppress(FileNotFoundError), explained(self):
            return {
                each["path"][start:]: each["size"]
                for some in obstore.list(self.bucket_client, prefix=self.key or None, chunk_size=1000)
                for each in some
            }
        return {}

    def iterdir(self) -> Generator[Self, None, None]:
        """Folders and objects right below."""
        folders, files = self.listing()
        for name in dict.fromkeys((*folders, *files)):
            yield self / name

    def glob(self, pattern: str, **how: Any) -> Iterator[Self]:  # type: ignore[override]
        """Folders and objects below whose way from here fits a pattern without ``**``."""
        first, _, rest = pattern.partition("/")
        if first == "**":
            yield from self.rglob(rest)
            return
        folders, files = self.listing()
        for name in fnmatch.filter(folders if rest else dict.fromkeys((*folders, *files)), first):
            if rest:
                yield from (self / name).glob(rest)
            else:
                yield self / name

    def rglob(self, pattern: str, **how: Any) -> Iterator[Self]:  # type: ignore[override]
        """Objects below, at any depth, whose names fit a pattern."""
        for name in sorted(self.sizes_below()):
            if fnmatch.fnmatchcase(PurePosixPath(name).name, pattern):
                yield self / name

    # ---- contents

    def read_bytes(self) -> bytes:
        """The whole object."""
        obstore = load_obstore()
        with explained(self):
            return bytes(obstore.get(self.bucket_client, self.key).bytes())

    def read_text(self, encoding: str | None = None, errors: str | None = None, **how: Any) -> str:
        """The whole object as text."""
        with self.open("r", encoding=encoding, errors=errors) as file:
            return str(file.read())

    def read_version(self) -> tuple[bytes, Version] | None:
        """The whole object, and which of its contents it is; None where there is none."""
        obstore = load_obstore()
        with contextlib.suppress(FileNotFoundError), explained(self):
            found = obstore.get(self.bucket_client, self.key)
            return bytes(found.bytes()), Version(found.meta["e_tag"] or "", found.meta["version"])
        return None

    def read_range(self, start: int, end: int, version: Version | None) -> bytes:
        """Some bytes of an object; OSError where it has changed meanwhile."""
        obstore = load_obstore()
        options: Any = {"range": (start, end)}
        if version is not None:
            options["if_match"] = version.e_tag
        with explained(self):
            return bytes(obstore.get(self.bucket_client, self.key, options=options).bytes())

    def blocks(self) -> Iterator[bytes]:
        """The whole object, some mebibytes at a time."""
        obstore = load_obstore()
        with explained(self):
            for block in obstore.get(self.bucket_client, self.key).stream(min_chunk_size=4 * 2**20):
                yield bytes(block)

    def open(self, mode: str = "r", buffering: int = -1, *how: Any, **more: Any) -> Any:
        """The whole object in memory, to be read; what is written goes through :func:`pathopipe.files.durable_file`."""
        if set(mode) - set("rbt"):
            raise io.UnsupportedOperation(f"{self}: objects are written whole, not opened with mode '{mode}'")
        file = io.BytesIO(self.read_bytes())
        return file if "b" in mode else io.TextIOWrapper(file, *how, **{"encoding": "utf-8", **_said(more)})

    def write_bytes(self, data: Any) -> int:
        """Put a whole object."""
        self.put(bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, *how: Any, **more: Any) -> int:
        """Put a whole object of text."""
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def put(self, data: bytes | IO[bytes]) -> None:
        """Put a whole object; it is there from the end on, and nothing of it before."""
        obstore = load_obstore()
        size = len(data) if isinstance(data, bytes) else data.seek(0, io.SEEK_END)
        if not isinstance(data, bytes):
            data.seek(0)
        with explained(self):
            parts: Any = {"use_multipart": size > _MULTIPART_BYTES, "chunk_size": _PART_BYTES}
            obstore.put(self.bucket_client, self.key, data, **parts)

    def create(self, data: bytes) -> Version | None:
        """Put an object where there is none; None where there is one."""
        return self._put_if(data, "create")

    def exchange(self, data: bytes, version: Version) -> Version | None:
        """Put an object in the place of what it held when it was last looked at; None where it holds something else."""
        return self._put_if(data, version.condition)

    def _put_if(self, data: bytes, mode: Any) -> Version | None:
        obstore = load_obstore()
        refused = (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError)
        with explained(self):
            try:
                put: Any = obstore.put(self.bucket_client, self.key, data, mode=mode, use_multipart=False)
            except refused:
                return None
            return Version(put["e_tag"] or "", put["version"])

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Put an empty object where there is none."""
        if self.create(b"") is None and not exist_ok:
            raise FileExistsError(errno.EEXIST, "there is such an object", str(self))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there when an object is in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object; S3 does not say whether there was one."""
        obstore = load_obstore()
        with explained(self):
            try:
                obstore.delete(self.bucket_client, self.key)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove_tree(self, *, but: tuple[str, ...] = ()) -> None:
        """Delete all objects below, a thousand a request."""
        obstore = load_obstore()
        names = [name for name in self.sizes_below() if name not in but]
        with contextlib.suppress(FileNotFoundError), explained(self):
            if names:
                obstore.delete(self.bucket_client, [f"{self.key}/{name}" if self.key else name for name in names])

    def copy_tree(self, target: "RemotePath") -> None:
        """Copy all objects below to another place of the bucket, within the server."""
        obstore = load_obstore()
        with explained(self):
            for name in self.sizes_below():
                obstore.copy(self.bucket_client, f"{self.key}/{name}", f"{target.key}/{name}")

    def rename(self, target: Any) -> Self:
        """Refused: a bucket has no renaming that is whole or nothing."""
        raise io.UnsupportedOperation(f"{self}: objects can't be renamed")

    replace = rename

    def chmod(self, mode: int, **how: Any) -> None:
        """Refused."""
        raise io.UnsupportedOperation(f"{self}: objects have no modes")


def check_rights(folder: RemotePath) -> None:
    """Make sure, within seconds, that objects can be listed, put, read and deleted, and put only where there is none.

    Raises:
        UsageError: It is no bucket, there is no such bucket, or the server does not keep to conditions.
        OSError: No rights, or no answer.
    """
    scheme, bucket, _ = folder._place
    if scheme in ("http", "https"):
        raise UsageError(
            f"{folder}: a web server takes no results; for a server that speaks S3 give s3://BUCKET/FOLDER and set "
            "AWS_ENDPOINT_URL"
        )
    obstore = load_obstore()
    refused = (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError)
    client = bucket_client(scheme, bucket, hasty=True)
    probe = folder / f".write-test-{uuid.uuid4().hex[:12]}"
    said = probe.name.encode()
    kept = []
    with explained(folder):
        obstore.put(client, probe.key, said, mode="create", use_multipart=False)
        try:
            # A server that knows no conditions says yes to these.
            for mode in ("create", Version('"00000000000000000000000000000000"').condition):
                with contextlib.suppress(*refused):
                    obstore.put(client, probe.key, said, mode=mode, use_multipart=False)
                    kept.append(mode)
            kept += [] if bytes(obstore.get(client, probe.key).bytes()) == said else ["what was put"]
            obstore.list_with_delimiter(client, probe.key)
        finally:
            obstore.delete(client, probe.key)
    if kept:
        raise UsageError(
            f"{folder}: this server does not keep to conditions (If-None-Match, If-Match), so two runs could write the "
            "same slide at once; take a newer release of it, another server, or a local --out"
        )


def _inner(segment: str | Path) -> str | Path:
    """A URL as the path that the arithmetic of paths works on."""
    if isinstance(segment, Path):
        return segment
    url = URL.fullmatch(segment)
    return f"/{_MARK}{url[1]}:/{url[2]}" if url is not None else segment


def _said(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
