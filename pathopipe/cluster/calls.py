"""Calls of any function on Dask workers."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pathopipe.cluster.memory import keep_freed_memory
from pathopipe.cluster.placement import Place

__all__ = ["spread_calls"]


def spread_calls(
    work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, workers: int, scheduler: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Call a function with each of some arguments on Dask workers; number and result of each as it ends.

    An object that stands in several calls is sent to the workers once.

    Args:
        work: Found by its name on the workers.
        calls: Arguments of each call.
        workers: Processes that are started on this machine.
        scheduler: Address of a Dask scheduler whose workers are used instead.

    Raises:
        UsageError: There is no scheduler at that address.
        Exception: What a call raised; those that have not ended are given up.
    """
    from distributed import as_completed

    from pathopipe.cluster.clients import open_client

    objects = {id(argument): argument for arguments in calls for argument in arguments}
    uses = Counter(id(argument) for arguments in calls for argument in arguments)
    with open_client(Place(workers=workers, scheduler=scheduler)) as client:
        sent = {key: client.scatter(objects[key], hash=False) for key, n_uses in uses.items() if n_uses > 1}
        numbers = {
            client.submit(_attempt, work, *(sent.get(id(one), one) for one in arguments), pure=False): number
            for number, arguments in enumerate(calls)
        }
        for future in as_completed(list(numbers)):
            result = future.result()
            if isinstance(result, Exception):
                raise result
            yield numbers.pop(future), result
            future.release()


def _attempt(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of some work, or the exception that ended it: one that is raised would fill the worker's log."""
    keep_freed_memory()
    try:
        return work(*arguments)
    except Exception as error:
        return error
