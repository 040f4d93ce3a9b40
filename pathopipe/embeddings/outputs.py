"""What is taken from a network's tokens: the class token, the mean of the patches, both, or all patches."""

import torch
from torch import Tensor

from pathopipe.embeddings.recipe import Output

__all__ = ["take"]


def take(tokens: Tensor, output: Output, prefix_tokens: int) -> Tensor:
    """(n, T, d) tokens, in the order class token, registers, patches -> (n, features).

    Registers are in no output. Means are computed in float32 whatever the tokens are in.

    Args:
        tokens: (n, T, d) float, after the network's last norm.
        output: ``cls``, ``mean``, ``cls-mean`` or ``tokens``.
        prefix_tokens: Tokens before the first patch: class token and registers.

    Returns:
        (n, d), (n, 2 * d) for ``cls-mean``, (n, (T - prefix_tokens) * d) for ``tokens``.

    Raises:
        ValueError: The output is not one of tokens, or there is no class token to take.
    """
    if output in ("cls", "cls-mean") and prefix_tokens == 0:
        raise ValueError(f"output '{output}' needs a class token, and this network has none")
    if output == "cls":
        return tokens[:, 0]
    patches = tokens[:, prefix_tokens:]
    if output == "mean":
        return _mean(patches)
    if output == "cls-mean":
        return torch.cat([tokens[:, 0].float(), _mean(patches)], dim=1)
    if output == "tokens":
        return patches.flatten(1)
    raise ValueError(f"output '{output}' is not one of tokens")


def _mean(patches: Tensor) -> Tensor:
    # Autocast leaves a mean in half precision, where a sum of some hundred numbers loses its last digits.
    return patches.float().mean(dim=1)
