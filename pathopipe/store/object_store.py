"""A folder of a bucket as a Zarr store: each object is put whole, and errors say what the server said."""

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from pathopipe.errors import StoreError, StoreWriteError
from pathopipe.remote import RemotePath, explained

__all__ = ["RemoteStore"]


class RemoteStore(ObjectStore[Any]):
    """All objects below a path; its client is that of the bucket, so that a cohort of stores shares connections."""

    def __init__(self, path: RemotePath, *, read_only: bool = False) -> None:
        super().__init__(path.bucket_client, read_only=read_only)
        self._path = path
        self._groups: set[str] = set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and (self._path, self.read_only) == (other._path, other.read_only)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return str(self._path)

    def __getstate__(self) -> dict[Any, Any]:
        return {"path": self._path, "read_only": self.read_only}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        RemoteStore.__init__(self, state["path"], read_only=state["read_only"])

    def with_read_only(self, read_only: bool = False) -> "RemoteStore":
        """The same store, for reading or for writing."""
        return RemoteStore(self._path, read_only=read_only)

    def forget(self) -> None:
        """Take no group for being there any more."""
        self._groups.clear()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The object; None where there is none."""
        with _reading(self._path / key):
            return await super().get(self._name(key), prototype, byte_range)

    async def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        with _reading(self._path / key):
            return await super().exists(self._name(key))

    async def set(self, key: str, value: Buffer) -> None:
        """Put an object, whole."""
        import obstore

        self._check_writable()
        with _writing(self._path / key):
            await obstore.put_async(self.store, self._name(key), value.as_buffer_like(), use_multipart=False)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Put an object where there is none; Zarr asks for this, array by array, for every group above it."""
        if key in self._groups:
            return
        with _writing(self._path / key):
            await super().set_if_not_exists(self._name(key), value)
        self._groups.add(key)

    async def delete(self, key: str) -> None:
        """Delete an object, if there is one."""
        with _writing(self._path / key):
            await super().delete(self._name(key))

    async def delete_dir(self, prefix: str) -> None:
        """Delete all objects below a folder."""
        with _writing(self._path / prefix):
            await super().delete_dir(self._name(prefix))

    async def list(self) -> AsyncGenerator[str, None]:
        """All objects."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        """All objects below a folder."""
        start = len(self._path.key) + 1
        with _reading(self._path / prefix):
            async for key in super().list_prefix(self._name(prefix)):
                yield key[start:]

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Names of what is right below a folder."""
        with _reading(self._path / prefix):
            async for key in super().list_dir(self._name(prefix)):
                yield key

    async def getsize(self, key: str) -> int:
        """Bytes of an object."""
        with _reading(self._path / key):
            return await super().getsize(self._name(key))

    async def getsize_prefix(self, prefix: str) -> int:
        """Bytes of all objects below a folder."""
        with _reading(self._path / prefix):
            return await super().getsize_prefix(self._name(prefix))

    def _name(self, key: str) -> str:
        """Of an object in the bucket."""
        return "/".join(part for part in (self._path.key, key.strip("/")) if part)


@contextlib.contextmanager
def _reading(path: RemotePath) -> Iterator[None]:
    """StoreError where the server does not give what is there."""
    try:
        with explained(path):
            yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: can't be read ({error.strerror}); run the same command again when that is mended"
        ) from error


@contextlib.contextmanager
def _writing(path: RemotePath) -> Iterator[None]:
    """StoreWriteError where the server does not take what is put."""
    try:
        with explained(path):
            yield
    except OSError as error:
        raise StoreWriteError(
            f"{path}: can't be written ({error.strerror}); what was finished before is kept: run the same command "
            "again when that is mended, or choose another --out"
        ) from error
