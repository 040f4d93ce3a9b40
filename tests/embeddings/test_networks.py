"""Networks of every row: built without memory and counted; what is taken from small ones, by value."""

import copy
import csv
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pathopipe.embeddings import custom, networks
from pathopipe.embeddings.catalog import catalog, find_encoder
from pathopipe.embeddings.networks import (
    EncoderNetwork,
    Measured,
    build_network,
    input_px,
    load_remote,
    measure,
    timm_recipe,
)
from pathopipe.embeddings.precision import with_bf16_weights
from pathopipe.embeddings.recipe import EncoderSpec, Transform
from pathopipe.errors import EncoderError

ROWS = {name: row for name, row in catalog().items() if row.loader != "handcrafted"}
ELSEWHERE = {name for name, row in ROWS.items() if row.remote_code} | {
    "conch-v1.5",
    "isight",
    "medimageinsight",
    "musk",
    "path-foundation",
}
"""Rows whose networks are code of their authors."""
BUILT = {name: row for name, row in ROWS.items() if name not in ELSEWHERE}
GIANT_M = 400

each_built = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * ((row.params_m or 0) > GIANT_M)) for name, row in BUILT.items()],
)

_MEASURED: dict[str, Measured] = {}


def measured(spec: EncoderSpec) -> Measured:
    """Many rows share an architecture; each is built once."""
    key = str((spec.loader, spec.architecture, sorted(spec.arguments.items()), spec.outputs, input_px(spec)))
    if key not in _MEASURED:
        _MEASURED[key] = measure(spec)
    return _MEASURED[key]


def row(name: str, **changes: Any) -> EncoderSpec:
    return ROWS[name].model_copy(update=changes)


def small(**changes: Any) -> EncoderSpec:
    """A row of timm's smallest ViT: 160 px in patches of 16, 64 numbers, a class token."""
    settings: dict[str, Any] = {
        "name": "small",
        "loader": "timm",
        "architecture": "test_vit",
        "transform": Transform(resize_px=160),
        "outputs": {"cls": 64, "mean": 64, "cls-mean": 128, "tokens": 6400, "pooled": 64},
        "output": "cls",
        "prefix_tokens": 1,
    }
    return EncoderSpec(**{**settings, **changes})


TILES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small run no faster on more, and much slower where others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Every row


@each_built
def test_a_row_is_what_it_says(name: str) -> None:
    spec, found = BUILT[name], measured(BUILT[name])
    assert spec.params_m is not None
    assert found.params_m == pytest.approx(spec.params_m, rel=1e-3)
    assert found.tokens == spec.tokens
    assert found.features == spec.outputs


@pytest.mark.shared_data
@each_built
def test_a_row_agrees_with_the_table(name: str, shared_data: Path) -> None:
    spec, found = BUILT[name], measured(BUILT[name])
    with (shared_data.parent / "reference" / "encoders.csv").open(newline="", encoding="utf-8") as file:
        table = {line["name"].lower(): line for line in csv.DictReader(file)}[name]
    if table["measured_dim"]:
        assert found.features[spec.output] == int(table["measured_dim"])
    tokens = table["measured_tokens"].split(" ")[0]
    if tokens.isdigit():
        # The table measured DINOv3 with tiles of 256 px.
        wider = 256 // 16 if "256 px" in table["verified_how"] else None
        assert found.tokens == (int(tokens) if wider is None else int(tokens) - wider**2 + (224 // 16) ** 2)
    towers = {"plip", "quiltnet-b-32", "quiltnet-b-16", "omiclip", "conch-v1"}  # the table has their text side in it
    if table["measured_params_m"] and name not in towers:
        assert found.params_m == pytest.approx(float(table["measured_params_m"]), rel=1e-3)


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_a_row_that_can_t_be_built_says_what_it_needs(name: str) -> None:
    spec = ROWS[name]
    with pytest.raises(EncoderError, match=f"^{name}: ") as raised:
        build_network(spec, device="meta")
    said = str(raised.value)
    if spec.remote_code:
        assert spec.weights.hub in said
        assert "embed.trust_remote_code=true" in said
    elif name == "musk":
        assert "package 'musk', which is not installed. pip install" in said
    else:
        assert "pathopipe import features" in said


def test_the_tower_of_conch_is_between_its_trunk_and_the_published_one() -> None:
    # Published: trunk 86.250 M, tower 90.393 M. What is left out: the pooler for captions (256 queries), its norm, and
    # the projection; with them the sum must be the tower's.
    caption = 256 * 768 + 4 * (768 * 768 + 768) + 2 * 2 * 768
    left_out = caption + 2 * 768 + 512 * 512
    assert measured(ROWS["conch-v1"]).params_m + left_out / 1e6 == pytest.approx(90.393, abs=0.0006)


# What goes wrong without notice


def test_virchow_without_its_gates_has_another_size() -> None:
    arguments = {key: value for key, value in ROWS["virchow"].arguments.items() if key != "mlp_layer"}
    spec = row("virchow", arguments={**arguments, "depth": 2})
    gated = row("virchow", arguments={**ROWS["virchow"].arguments, "depth": 2})
    assert measure(spec).params_m > 1.15 * measure(gated).params_m


@pytest.mark.slow
def test_virchow_without_its_gates_is_caught() -> None:
    arguments = {key: value for key, value in ROWS["virchow"].arguments.items() if key != "mlp_layer"}
    found = measure(row("virchow", arguments=arguments))
    assert found.params_m == pytest.approx(771.1, abs=0.1)
    assert ROWS["virchow"].params_m == pytest.approx(631.2, abs=0.1)


@pytest.mark.parametrize("name", ["uni2-h", "virchow", "virchow2", "h0-mini", "hibou-b", "hibou-l", "midnight-12k"])
def test_gates_are_silu(name: str) -> None:
    spec = ROWS[name]
    depth = {"depth": 1} if spec.loader == "timm" else {"num_hidden_layers": 1}
    network = build_network(row(name, arguments={**spec.arguments, **depth}), device="meta").network
    gates = [module for key, module in network.named_modules() if key.endswith((".mlp.act", ".mlp.act_fn"))]
    assert [type(gate).__name__ for gate in gates] in (["SiLU"], ["SiLUActivation"])


@pytest.mark.parametrize("name", [name for name in BUILT if name.startswith("dinov3")])
def test_dinov3_returns_its_class_token(name: str) -> None:
    spec = ROWS[name]
    assert spec.output == "cls"
    assert spec.arguments["global_pool"] == "token"
    tiny = {"depth": 1, "embed_dim": 64, "num_heads": 1, "mlp_ratio": 4}
    encoder = build_network(
        row(name, architecture="vit_small_patch16_dinov3", arguments={**spec.arguments, **tiny})
    ).eval()
    tile = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        tokens = encoder.tokens(tile)
        torch.testing.assert_close(encoder(tile), tokens[:, 0])
        torch.testing.assert_close(encoder.network(tile), tokens[:, 0])
        assert not torch.allclose(encoder(tile), tokens[:, 5:].mean(dim=1), atol=1e-2)


CLS_ROWS = {
    str((spec.architecture, spec.arguments)): name
    for name, spec in BUILT.items()
    if spec.loader in ("timm", "torch") and spec.output == "cls"
}


@pytest.mark.parametrize("name", CLS_ROWS.values())
def test_the_class_token_is_what_timm_returns(name: str) -> None:
    spec = ROWS[name]
    tiny = {"depth": 1, "embed_dim": 64, "num_heads": 1, "mlp_ratio": 4}
    encoder = build_network(row(name, arguments={**spec.arguments, **tiny})).eval()
    side_px = input_px(spec)
    tile = torch.randn(1, 3, side_px, side_px)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(tile), encoder.network(tile))


def test_kimianet_pools_without_a_relu() -> None:
    encoder = build_network(ROWS["kimianet"]).eval()
    tiles = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = encoder.network.features(tiles)  # type: ignore[operator]
        torch.testing.assert_close(encoder(tiles), maps.mean(dim=(2, 3)))
        assert (encoder(tiles) < 0).any()
        assert not torch.allclose(encoder(tiles), functional.relu(maps).mean(dim=(2, 3)))


def test_resnet50_to_layer_3_is_resnet50_cut_short() -> None:
    cut, whole = build_network(ROWS["resnet50-trunc-imagenet"]).eval(), build_network(ROWS["resnet50-imagenet"]).eval()
    state = {key: value for key, value in whole.network.state_dict().items() if not key.startswith("layer4.")}
    cut.network.load_state_dict(state, strict=True)
    tile = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        x = tile
        for part in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"):
            x = whole.network.get_submodule(part)(x)
        torch.testing.assert_close(cut(tile), x.mean(dim=(2, 3)))


def test_ctranspath_is_swin_behind_three_convolutions() -> None:
    encoder = build_network(ROWS["ctranspath"]).eval()
    shapes = {key: tuple(value.shape) for key, value in encoder.network.state_dict().items() if "patch_embed" in key}
    assert shapes["patch_embed.proj.0.weight"] == (12, 3, 3, 3)
    assert shapes["patch_embed.proj.3.weight"] == (24, 12, 3, 3)
    assert shapes["patch_embed.proj.6.weight"] == (96, 24, 1, 1)
    assert shapes["patch_embed.norm.weight"] == (96,)
    tile = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        maps = encoder.network.forward_features(tile)  # type: ignore[operator]
        assert maps.shape == (1, 7, 7, 768)
        torch.testing.assert_close(encoder(tile), maps.mean(dim=(1, 2)))


def test_pathoduet_averages_patches_before_its_norm() -> None:
    encoder = build_network(row("pathoduet-he", arguments={**ROWS["pathoduet-he"].arguments, "depth": 1})).eval()
    tile = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        tokens = encoder.tokens(tile)
        expected = encoder.network.fc_norm(tokens[:, 2:].mean(dim=1))  # type: ignore[operator]
        torch.testing.assert_close(encoder(tile), expected)


def test_keep_has_length_1_and_its_parts_have_the_names_of_the_checkpoint() -> None:
    encoder = build_network(row("keep", arguments={**ROWS["keep"].arguments, "depth": 1})).eval()
    keys = encoder.network.state_dict().keys()
    assert all(key.startswith(("visual.", "visual_head.")) for key in keys)
    assert {"visual.blocks.0.ls1.gamma", "visual_head.0.weight", "visual_head.2.bias"} <= keys
    with torch.inference_mode():
        vectors = encoder(torch.randn(2, 3, 224, 224))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_conch_pools_its_tokens_as_torch_attends() -> None:
    encoder = build_network(ROWS["conch-v1"], device="meta").eval()
    network, pool = encoder.network, custom._AttentionPool(512, 768, queries=1, heads=8)
    network.attn_pool_contrast, network.ln_contrast = pool, nn.LayerNorm(512)
    tokens = torch.randn(2, 9, 768)
    network.forward_features = lambda batch: tokens  # type: ignore[assignment]
    with torch.inference_mode():
        keys = pool.get_submodule("ln_k")(tokens)
        asked = pool.get_submodule("ln_q")(pool.get_parameter("query"))
        attn = pool.get_submodule("attn")
        bias_q, bias_k, bias_v = attn.in_proj_bias.chunk(3)  # type: ignore[operator, union-attr]
        q, k, v = (
            functional.linear(x, attn.get_parameter(f"{part}_proj_weight"), bias)
            .unflatten(-1, (8, 64))
            .transpose(-3, -2)
            for part, x, bias in (
                ("q", asked[None].expand(2, -1, -1), bias_q),
                ("k", keys, bias_k),
                ("v", keys, bias_v),
            )
        )
        mixed = (q @ k.transpose(-2, -1) / 8).softmax(dim=-1) @ v
        expected = attn.get_submodule("out_proj")(mixed.transpose(-3, -2).flatten(-2))[:, 0]
        expected = network.get_submodule("ln_contrast")(expected)
        torch.testing.assert_close(encoder(torch.empty(2, 3, 448, 448)), expected, atol=1e-5, rtol=1e-4)


def test_omiclip_has_length_1_and_quiltnet_has_not() -> None:
    tile = torch.randn(2, 3, 224, 224)
    for name, is_unit in (("omiclip", True), ("quiltnet-b-32", False)):
        vision = {**ROWS[name].arguments["vision_cfg"], "layers": 1}
        encoder = build_network(row(name, arguments={**ROWS[name].arguments, "vision_cfg": vision})).eval()
        with torch.inference_mode():
            lengths = encoder(tile).norm(dim=1)
        assert torch.allclose(lengths, torch.ones(2)) is is_unit


def test_open_clip_tokens_lead_to_its_vector() -> None:
    vision = {**ROWS["quiltnet-b-32"].arguments["vision_cfg"], "layers": 1}
    arguments = {**ROWS["quiltnet-b-32"].arguments, "vision_cfg": vision}
    encoder = build_network(row("quiltnet-b-32", arguments=arguments)).eval()
    tile = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        projected = encoder.tokens(tile)[:, 0] @ encoder.network.get_parameter("proj")
        torch.testing.assert_close(encoder(tile), projected)


def test_transformers_tokens_lead_to_its_vector() -> None:
    tile = torch.randn(1, 3, 224, 224)
    plip = build_network(row("plip", arguments={**ROWS["plip"].arguments, "num_hidden_layers": 1})).eval()
    with torch.inference_mode():
        projected = plip.network.get_submodule("visual_projection")(plip.tokens(tile)[:, 0])
        torch.testing.assert_close(plip(tile), projected)
    hibou = build_network(
        row(
            "hibou-b",
            arguments={**ROWS["hibou-b"].arguments, "num_hidden_layers": 1},
            outputs={"pooled": 768, "cls": 768},
        )
    ).eval()
    with torch.inference_mode():
        torch.testing.assert_close(hibou.taken(tile, "pooled"), hibou(tile))


# Building


def test_every_output_of_a_small_network() -> None:
    encoder = build_network(small()).eval()
    with torch.inference_mode():
        tokens = encoder.tokens(TILES)
        assert tokens.shape == (2, 101, 64)
        torch.testing.assert_close(encoder(TILES), tokens[:, 0])
        torch.testing.assert_close(encoder.taken(TILES, "mean"), tokens[:, 1:].mean(dim=1))
        torch.testing.assert_close(encoder.taken(TILES, "pooled"), encoder.network(TILES))
        assert encoder.taken(TILES, "cls-mean").shape == (2, 128)
        assert encoder.taken(TILES, "tokens").shape == (2, 6400)
    assert measure(small()).features == small().outputs


def test_a_bare_architecture_of_timm_has_timms_recipe() -> None:
    spec = find_encoder("timm.test_vit")
    encoder = build_network(spec)
    assert timm_recipe(encoder.network) == Transform(
        resize="exact", resize_px=160, filter="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    assert measure(spec) == Measured(params_m=0.30624, tokens=101, features={"pooled": 64})
    with pytest.raises(EncoderError, match="its row has no transform"):
        input_px(spec)
    oblong = nn.Identity()
    oblong.pretrained_cfg = {"architecture": "odd", "input_size": (3, 288, 160)}  # type: ignore[assignment]
    with pytest.raises(EncoderError, match="odd: wants input of 160 x 288 px"):
        timm_recipe(oblong)


def test_random_numbers_come_from_the_seed_and_leave_the_global_ones() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (build_network(small(), seed=seed).network.state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["patch_embed.proj.weight"], other["patch_embed.proj.weight"])


def test_on_meta_there_is_nothing_in_memory_and_all_names_are_the_same() -> None:
    for spec in (small(), row("hibou-b", arguments={**ROWS["hibou-b"].arguments, "num_hidden_layers": 1})):
        here, nowhere = (
            build_network(spec).network.state_dict(),
            build_network(spec, device="meta").network.state_dict(),
        )
        assert all(value.is_meta for value in nowhere.values())
        assert {key: value.shape for key, value in here.items()} == {k: v.shape for k, v in nowhere.items()}
        with torch.device("meta"):
            assert all(value.is_meta for value in build_network(spec).network.state_dict().values())


@pytest.mark.parametrize("output", ["cls", "mean", "pooled"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_is_near_fp32(half: torch.dtype, output: Any) -> None:
    encoder = build_network(small(output=output)).eval()
    with torch.inference_mode():
        full = encoder(TILES)
        with torch.autocast("cpu", dtype=half):
            near = encoder(TILES).float()
    assert not torch.equal(full, near)
    assert functional.cosine_similarity(full, near, dim=1).min() > 0.999


def test_a_copy_with_bf16_weights_is_near_fp32() -> None:
    encoder = build_network(small(output="cls-mean")).eval()
    half = with_bf16_weights(encoder)
    assert isinstance(half, EncoderNetwork)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        full = encoder(TILES)
        near = half(TILES.to(torch.bfloat16, memory_format=torch.channels_last)).float()
        assert functional.cosine_similarity(full, near, dim=1).min() > 0.999
        assert torch.equal(copy.deepcopy(encoder)(TILES), full)


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "vit_smal_patch16_224"}, "no architecture 'vit_smal_patch16_224'; did you mean 'vit_small"),
        ({"architecture": "hf-hub:owner/name"}, "timm has no architecture 'hf-hub:owner/name'"),
        ({"prefix_tokens": 5}, "test_vit has 1 tokens before the patches, the row says 5; correct prefix_tokens"),
        ({"arguments": {"reg_tokens": 4}}, "test_vit has 5 tokens before the patches, the row says 1"),
        ({"arguments": {"global_pool": "avg"}}, "normalises after pooling"),
        ({"arguments": {"deepth": 3}}, "timm can't build test_vit with {'deepth': 3}"),
        ({"arguments": {"pretrained": True}}, "timm can't build test_vit"),
        (
            {"arguments": {"act_layer": "torch.nn.SILU"}},
            "not a class that a row may name; did you mean 'torch.nn.SiLU'",
        ),
        ({"arguments": {"act_layer": "torch.hub.load"}}, "'torch.hub.load' is not a class that a row may name"),
        ({"architecture": "test_resnet"}, "test_resnet has no tokens; its one output is 'pooled'"),
        ({"loader": "transformers", "architecture": "AutoModel"}, "'AutoModel' is not a class that a row may name"),
        (
            {"loader": "transformers", "architecture": "ViTModel", "arguments": {"hiden_size": 8}},
            "ViTConfig has no hiden_size",
        ),
        (
            {
                "loader": "transformers",
                "architecture": "Dinov2WithRegistersModel",
                "arguments": {"num_register_tokens": 4},
            },
            "has 5 tokens before the patches, the row says 1",
        ),
        ({"loader": "open_clip", "arguments": {"embed_dim": 8}}, "give embed_dim and vision_cfg"),
        (
            {"loader": "torch", "architecture": "kimianet", "arguments": {"x": 1}},
            "kimianet can't be built with {'x': 1}",
        ),
        ({"loader": "custom", "architecture": "mine", "package": "os"}, "pathopipe can't build its network"),
    ],
)
def test_wrong_rows_are_explained(changes: Mapping[str, Any], said: str) -> None:
    with pytest.raises(EncoderError) as raised:
        build_network(small(**changes), device="meta")
    assert said in str(raised.value)


def test_handcrafted_is_no_network() -> None:
    with pytest.raises(EncoderError, match="handcrafted: is computed without a network"):
        build_network(find_encoder("handcrafted"))


@pytest.mark.parametrize(("name", "module"), [("hibou-b", "transformers"), ("biomedclip", "open_clip")])
def test_a_missing_extra_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.model", raising=False)
    with pytest.raises(EncoderError, match=f"{name}: needs {module}.*; pip install 'pathopipe\\[hub\\]'"):
        build_network(ROWS[name], device="meta")


def test_tokens_are_refused_where_there_are_none() -> None:
    encoder = build_network(ROWS["resnet50-imagenet"], device="meta")
    assert not encoder.has_tokens
    with pytest.raises(EncoderError, match="ResNet has no tokens"):
        encoder.tokens(torch.empty(1, 3, 224, 224, device="meta"))


# Code of others


class _Theirs(nn.Module):
    """What a package or a hub repository might bring."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: torch.Tensor, **settings: bool) -> Any:
        tokens = self.scale * image.flatten(2).transpose(1, 2)[:, :6]  # (n, 6, 3)
        if "with_head" in settings:
            assert settings == ROWS["musk"].arguments
            return tokens[:, 0], None
        return types.SimpleNamespace(last_hidden_state=tokens, pooler_output=tokens[:, 0] + 1)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return self.scale * image.mean(dim=(2, 3))


def test_musk_is_built_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    package, modeling = types.ModuleType("musk"), types.ModuleType("musk.modeling")
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "musk", package)
    monkeypatch.setitem(sys.modules, "musk.modeling", modeling)
    asked: list[str] = []
    monkeypatch.setattr(timm, "create_model", lambda name: asked.append(name) or _Theirs())
    encoder = build_network(ROWS["musk"])
    image = torch.randn(2, 3, 4, 4)
    assert asked == ["musk_large_patch16_384"]
    assert torch.equal(encoder(image), 2 * image[:, :, 0, 0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("phaet", lambda image, tokens: 2 * image.mean(dim=(2, 3))),
        ("conceptclip", lambda image, tokens: tokens[:, 0] + 1),
        ("rudolfv-2.cls", lambda image, tokens: tokens[:, 0]),
    ],
)
def test_code_of_the_hub_is_loaded_by_name_and_revision(
    name: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    calls: list[tuple[str, dict[str, Any]]] = []

    def from_pretrained(source: str, **settings: Any) -> nn.Module:
        calls.append((source, settings))
        return _Theirs()

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)
    spec = find_encoder(name)
    encoder = load_remote(spec, spec.weights.hub, "abc")
    wanted = {"revision": "abc", "trust_remote_code": True, "dtype": torch.float32}
    assert calls == [(spec.weights.hub, wanted)]
    image = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(encoder(image), expected(image, encoder.tokens(image)))


def test_code_of_the_hub_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers

    def from_pretrained(source: str, **settings: Any) -> nn.Module:
        raise AttributeError("'Titan' object has no attribute 'all_tied_weights_keys'\nwhatever")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)
    with pytest.raises(EncoderError, match="phaet: the code of .* can't be loaded .AttributeError: 'Titan' object"):
        load_remote(ROWS["phaet"], tmp_path)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda source, **settings: nn.Identity())
    encoder = load_remote(ROWS["conceptclip"], tmp_path)
    encoder.network.forward = lambda batch: {"scores": batch}  # type: ignore[method-assign]
    with pytest.raises(EncoderError, match=r"no vector of the tile in what the network returns \(dict\)"):
        encoder(torch.zeros(1, 3, 4, 4))


def test_the_classes_a_row_may_name_exist() -> None:
    assert networks._class_of_text(small(), "torch.nn.SiLU") is nn.SiLU
    assert all(callable(networks._class_of_text(small(), text)) for text in networks._CLASSES)
