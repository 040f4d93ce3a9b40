"""What is taken from tokens: registers are in nothing, means are of patches and in float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathopipe.embeddings.outputs import take
from pathopipe.embeddings.recipe import OUTPUTS, Output

TOKEN_OUTPUTS: tuple[Output, ...] = ("cls", "mean", "cls-mean", "tokens")


def drawn(seed: int, tiles: int, tokens: int, features: int) -> torch.Tensor:
    return torch.randn(tiles, tokens, features, generator=torch.Generator().manual_seed(seed))


shapes = st.tuples(
    st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 8), st.integers(1, 25), st.integers(1, 6)
)  # seed, tiles, registers, patches, features


def test_values_by_hand() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [100.0, 100.0], [3.0, 5.0], [5.0, 9.0]]])  # class, one register, two patches
    assert take(tokens, "cls", 2).tolist() == [[1, 2]]
    assert take(tokens, "mean", 2).tolist() == [[4, 7]]
    assert take(tokens, "cls-mean", 2).tolist() == [[1, 2, 4, 7]]
    assert take(tokens, "tokens", 2).tolist() == [[3, 5, 5, 9]]


def test_every_output_of_tokens_is_known() -> None:
    assert {*TOKEN_OUTPUTS, "pooled"} == set(OUTPUTS)
    with pytest.raises(ValueError, match="'pooled' is not one of tokens"):
        take(torch.zeros(1, 3, 2), "pooled", 1)


@given(shapes)
def test_registers_change_nothing(shape: tuple[int, int, int, int, int]) -> None:
    seed, tiles, registers, patches, features = shape
    tokens = drawn(seed, tiles, 1 + registers + patches, features)
    changed = tokens.clone()
    changed[:, 1 : 1 + registers] = float("nan")
    for output in TOKEN_OUTPUTS:
        assert torch.equal(take(tokens, output, 1 + registers), take(changed, output, 1 + registers))


@given(shapes)
def test_the_mean_knows_no_order_of_patches(shape: tuple[int, int, int, int, int]) -> None:
    seed, tiles, registers, patches, features = shape
    prefix = 1 + registers
    tokens = drawn(seed, tiles, prefix + patches, features)
    order = torch.cat([torch.arange(prefix), prefix + torch.randperm(patches)])
    torch.testing.assert_close(take(tokens[:, order], "mean", prefix), take(tokens, "mean", prefix))


@given(shapes)
def test_widths_and_parts(shape: tuple[int, int, int, int, int]) -> None:
    seed, tiles, registers, patches, features = shape
    prefix = 1 + registers
    tokens = drawn(seed, tiles, prefix + patches, features)
    both, flat = take(tokens, "cls-mean", prefix), take(tokens, "tokens", prefix)
    assert both.shape == (tiles, 2 * features)
    assert flat.shape == (tiles, patches * features)
    assert torch.equal(both, torch.cat([take(tokens, "cls", prefix), take(tokens, "mean", prefix)], dim=1))
    assert torch.equal(flat.view(tiles, patches, features), tokens[:, prefix:])


@given(shapes)
def test_every_patch_counts_alike(shape: tuple[int, int, int, int, int]) -> None:
    seed, tiles, registers, patches, features = shape
    prefix = 1 + registers
    tokens = drawn(seed, tiles, prefix + patches, features)
    moved = tokens.clone()
    moved[:, prefix + seed % patches] += patches
    torch.testing.assert_close(take(moved, "mean", prefix), take(tokens, "mean", prefix) + 1, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("output", ["cls", "cls-mean"])
def test_no_class_token_no_output(output: Output) -> None:
    with pytest.raises(ValueError, match="needs a class token"):
        take(torch.zeros(1, 4, 2), output, 0)
    assert take(torch.ones(1, 4, 2), "mean", 0).tolist() == [[1, 1]]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_means_of_half_precision_are_in_float32(half: torch.dtype) -> None:
    tokens = (1000 + torch.arange(257.0)).view(1, 257, 1).to(half)
    exact = tokens[:, 1:].double().mean(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for output in ("mean", "cls-mean"):
            taken = take(tokens, output, 1)  # type: ignore[arg-type]
            assert taken.dtype == torch.float32
            assert taken[0, -1] == pytest.approx(exact[0, 0].item(), rel=1e-6)
    assert tokens[:, 1:].mean(dim=1).double() != exact, "a mean in half precision would do as well"
