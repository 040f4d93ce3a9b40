"""Weights: where they are looked for, what is said where there are none, and how files become networks."""

import hashlib
import json
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pathopipe.embeddings.networks import build_network
from pathopipe.embeddings.recipe import EncoderSpec, Weights
from pathopipe.embeddings.weights import find_repository, find_weights, load_weights, locate_weights, weights_help
from pathopipe.errors import EncoderError

VIT = EncoderSpec(
    name="tiny",
    loader="timm",
    architecture="test_vit",
    arguments={"num_classes": 0},
    weights=Weights(hub="owner/tiny"),
    outputs={"pooled": 64},
    output="pooled",
    license="CC-BY-NC-4.0",
    commercial="no",
    gated="yes",
)


def with_rules(spec: EncoderSpec = VIT, **rules: object) -> EncoderSpec:
    return spec.model_copy(update={"weights": Weights.model_validate({"hub": "owner/tiny", **rules})})


def network(spec: EncoderSpec = VIT, seed: int = 0, device: str = "cpu") -> nn.Module:
    return build_network(spec, seed=seed, device=device).network


def save(state: Mapping[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    else:
        torch.save(dict(state), path)
    return path


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


class FakeHub:
    """The functions of huggingface_hub that are used, on a folder."""

    def __init__(self, folder: Path, files: Mapping[str, bytes]) -> None:
        self.folder, self.files, self.cached = folder, files, set[str]()
        self.fetched: list[tuple[str, str, str | None]] = []
        self.error: Exception | None = None

    def path(self, name: str) -> Path:
        return self.folder / "models--owner--tiny" / "snapshots" / "c0ffee" / name

    def try_to_load_from_cache(self, repo: str, name: str, revision: str | None = None) -> str | None:
        return str(self.path(name)) if name in self.cached else None

    def model_info(self, repo: str, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        siblings = [SimpleNamespace(rfilename=name, size=len(content)) for name, content in self.files.items()]
        return SimpleNamespace(siblings=siblings, sha="c0ffee")

    def hf_hub_download(self, repo: str, name: str, *, revision: str | None) -> str:
        self.fetched.append((repo, name, revision))
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_bytes(self.files[name])
        self.cached.add(name)
        return str(self.path(name))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "cache", {"README.md": b"x", "model.safetensors": b"w" * 2_000_000})
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)  # type: ignore[arg-type]
    return fake


# Where they are


def test_the_users_file_comes_first(tmp_path: Path, hub: FakeHub) -> None:
    mine, mirrored = tmp_path / "mine.pt", tmp_path / "tiny.pt"
    mine.touch()
    mirrored.touch()
    found = find_weights(VIT, weights=mine, weights_dir=tmp_path)
    assert found is not None
    assert (found.path, found.source) == (mine, "file")
    for name, spec in (("tiny", VIT), ("tiny", VIT.model_copy(update={"name": "tiny.cls"}))):
        found = find_weights(spec, weights={name: mine}, weights_dir=None)
        assert found is not None
        assert found.path == mine
    assert find_weights(VIT, weights={"other": mine}, weights_dir=None) is None
    with pytest.raises(EncoderError, match="no such weights file"):
        find_weights(VIT, weights=tmp_path / "absent.pt", weights_dir=tmp_path)


def test_a_folder_as_the_users_file(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    with pytest.raises(EncoderError, match=r"is a folder without model\.safetensors or .* name the weights file"):
        find_weights(VIT, weights=folder, weights_dir=None)
    (folder / "pytorch_model.bin").touch()
    found = find_weights(VIT, weights=folder, weights_dir=None)
    assert found is not None
    assert found.path.name == "pytorch_model.bin"


def test_the_mirror_folder(tmp_path: Path, hub: FakeHub) -> None:
    """By the encoder's name, then as on the hub; each file that is added comes before those that were there."""
    spec = with_rules(file="weights.bin").model_copy(update={"name": "tiny.cls"})
    for name in (
        "owner/tiny/pytorch_model.bin",
        "owner/tiny/weights.bin",
        "tiny.ckpt",
        "tiny.pth",
        "tiny.safetensors",
        "tiny.cls.pt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        found = locate_weights(spec, weights=None, weights_dir=tmp_path)
        assert (found.path, found.source) == (path, "mirror")


def test_an_open_clip_mirror_has_its_own_names(tmp_path: Path) -> None:
    spec = VIT.model_copy(update={"loader": "open_clip"})
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    (tmp_path / "owner" / "tiny" / "open_clip_pytorch_model.bin").touch()
    found = locate_weights(spec, weights=None, weights_dir=tmp_path)
    assert found.path.name == "open_clip_pytorch_model.bin"


def test_with_a_mirror_folder_nothing_is_fetched(tmp_path: Path, hub: FakeHub) -> None:
    mirror = tmp_path / "mirror"
    with pytest.raises(EncoderError, match="no such folder; check embed.weights_dir"):
        locate_weights(VIT, weights=None, weights_dir=mirror)
    mirror.mkdir()
    with pytest.raises(EncoderError) as caught:
        locate_weights(VIT, weights=None, weights_dir=mirror)
    for path in (mirror / "tiny.safetensors", mirror / "owner" / "tiny" / "model.safetensors"):
        assert str(path) in str(caught.value)
    assert not hub.fetched
    hub.hf_hub_download("owner/tiny", "model.safetensors", revision=None)
    assert locate_weights(VIT, weights=None, weights_dir=mirror).source == "hub"


def test_a_download_says_the_terms_first(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pathopipe"):
        found = locate_weights(VIT, weights=None, weights_dir=None)
    assert hub.fetched == [("owner/tiny", "model.safetensors", "c0ffee")]
    assert (found.path.name, found.source, found.revision) == ("model.safetensors", "hub", "c0ffee")
    expected = (
        "fetching model.safetensors of owner/tiny (0.00 GB); licence CC-BY-NC-4.0, gated: yes, commercial use: no"
    )
    assert [record.getMessage() for record in caplog.records] == [f"tiny: {expected}"]
    # The second time it is there, and nothing is said.
    again = locate_weights(VIT, weights=None, weights_dir=None, download=False)
    assert (again, len(hub.fetched), len(caplog.records)) == (found, 1, 1)


def test_nothing_is_fetched_where_it_is_forbidden(hub: FakeHub) -> None:
    with pytest.raises(EncoderError, match="tiny: no weights on this machine"):
        locate_weights(VIT, weights=None, weights_dir=None, download=False)
    assert not hub.fetched


def test_shards_are_fetched_with_their_index(hub: FakeHub) -> None:
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}
    hub.files = {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": b"1",
        "model-2.safetensors": b"2",
    }
    found = locate_weights(VIT, weights=None, weights_dir=None)
    assert found.path.name == "model.safetensors.index.json"
    assert [name for _, name, _ in hub.fetched] == [
        "model.safetensors.index.json",
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    assert find_weights(VIT, weights=None, weights_dir=None) == found
    hub.path("model-2.safetensors").unlink()  # as an interrupted download leaves it
    assert find_weights(VIT, weights=None, weights_dir=None) is None


def test_a_repository_without_the_file(hub: FakeHub) -> None:
    with pytest.raises(EncoderError, match=r"owner/tiny on the hub has no w\.pt \(it lists README.md, model.safet"):
        locate_weights(with_rules(file="w.pt"), weights=None, weights_dir=None)
    assert not hub.fetched


def hub_error(name: str, status: int | None = None, text: str = "details") -> Exception:
    error: Exception = type(name, (OSError,), {})(text)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (hub_error("GatedRepoError"), "only accounts in that have accepted the terms"),
        (hub_error("HfHubHTTPError", 401), "only accounts in that have accepted the terms"),
        (hub_error("HfHubHTTPError", 403), "only accounts in that have accepted the terms"),
        (hub_error("RepositoryNotFoundError", 404), "no such repository, revision or file (owner/tiny)"),
        (hub_error("RevisionNotFoundError"), "no such repository, revision or file (owner/tiny)"),
        (hub_error("LocalEntryNotFoundError", text="offline\nmore"), "can't be reached (LocalEntryNotFoundError: off"),
        (ConnectionError(), "can't be reached (ConnectionError: )"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_can_go_wrong_at_the_hub(hub: FakeHub, error: Exception, reason: str) -> None:
    hub.error = error
    with pytest.raises(EncoderError, match=re.escape(reason)) as caught:
        locate_weights(VIT, weights=None, weights_dir=None)
    message = str(caught.value)
    # The three ways.
    assert "https://huggingface.co/owner/tiny" in message
    assert "hf auth login" in message
    assert "--set embed.weights=FILE" in message
    assert "--set embed.weights_dir=DIR with tiny.safetensors or owner/tiny/model.safetensors" in message


def test_the_errors_of_the_real_client_are_known() -> None:
    """The names that are looked for are those of the installed huggingface_hub."""
    from huggingface_hub import errors

    for name in ("GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError"):
        assert issubclass(getattr(errors, name), OSError)


def test_without_the_hubs_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EncoderError, match="pip install huggingface_hub"):
        locate_weights(VIT, weights=None, weights_dir=None)


def test_weights_that_are_not_on_the_hub(hub: FakeHub) -> None:
    spec = VIT.model_copy(update={"weights": Weights(), "access": "ask them at example.org"})
    with pytest.raises(EncoderError, match=r"not on the hub\n1\. from the authors .*: ask them at example\.org"):
        locate_weights(spec, weights=None, weights_dir=None)
    assert "open; run again with a network" in weights_help(VIT.model_copy(update={"gated": "no"}))


def test_the_copy_of_a_repository_with_code(tmp_path: Path) -> None:
    assert find_repository(VIT, weights=None, weights_dir=None) is None
    with pytest.raises(EncoderError, match="a folder with a copy of the hub repository owner/tiny is needed"):
        find_repository(VIT, weights=None, weights_dir=tmp_path)
    folder = tmp_path / "owner" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert find_repository(VIT, weights=None, weights_dir=tmp_path) == folder
    assert find_repository(VIT, weights={"tiny": folder}, weights_dir=None) == folder


# From a file to a network


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_value_arrives(tmp_path: Path, suffix: str, device: str) -> None:
    state = network(seed=7).state_dict()
    path = save({**state, "head.weight": torch.zeros(10, 64)}, tmp_path / f"w{suffix}")
    target = network(device=device)
    assert load_weights(target, VIT, path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(target.state_dict(), state)
    assert all(torch.isfinite(value).all() for value in target.state_dict().values())


def test_a_file_may_change_after_it_was_read(tmp_path: Path) -> None:
    path = save(network(seed=7).state_dict(), tmp_path / "w.safetensors")
    target = network(device="meta")
    load_weights(target, VIT, path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert same(target.state_dict(), network(seed=7).state_dict())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_half_precision_files_become_fp32(tmp_path: Path, device: str) -> None:
    state = {key: value.half() for key, value in network(seed=7).state_dict().items()}
    target = network(device=device)
    load_weights(target, VIT, save(state, tmp_path / "w.safetensors"))
    assert {value.dtype for value in target.state_dict().values()} == {torch.float32}
    assert same(target.state_dict(), {key: value.float() for key, value in state.items()})


def test_weights_in_shards(tmp_path: Path) -> None:
    state = network(seed=7).state_dict()
    keys = sorted(state)
    parts = {"b-2.safetensors": keys[:9], "a-1.safetensors": keys[9:]}
    for name, names in parts.items():
        save({key: state[key] for key in names}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, names in parts.items() for key in names}}))
    target = network()
    both = (tmp_path / "a-1.safetensors").read_bytes() + (tmp_path / "b-2.safetensors").read_bytes()
    assert load_weights(target, VIT, index) == hashlib.sha256(both).hexdigest()
    assert same(target.state_dict(), state)
    (tmp_path / "b-2.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"b-2\.safetensors: no such weights file"):
        load_weights(network(), VIT, index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not the index of weights in shards"),
        ("not json", "not the index of weights in shards"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "names files of other folders"),
        ('{"weight_map": {"a": "/secret.safetensors"}}', "names files of other folders"),
    ],
)
def test_a_wrong_index(tmp_path: Path, text: str, message: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(EncoderError, match=message):
        load_weights(network(), VIT, index)


def test_the_rules_of_a_row(tmp_path: Path) -> None:
    state = network(seed=7).state_dict()
    old = {f"teacher.backbone.{key.replace('blocks.', 'blocks.0.')}": value for key, value in state.items()}
    old |= {"student.backbone.cls_token": torch.zeros(1), "teacher.dino_head.weight": torch.zeros(1)}
    path = tmp_path / "w.pt"
    torch.save({"weights": old, "epoch": 3}, path)
    spec = with_rules(
        entry="weights",
        keep=["teacher."],
        drop=["teacher.dino_head."],
        strip=["teacher.", "backbone."],
        rename={r"^blocks\.0\.(\d+)": r"blocks.\1"},
    )
    target = network()
    load_weights(target, spec, path)
    assert same(target.state_dict(), state)
    with pytest.raises(EncoderError, match="the checkpoint has no 'teacher'; it has weights, epoch"):
        load_weights(network(), with_rules(entry="teacher"), path)
    # A table that was saved without the rest of its checkpoint needs no entry.
    load_weights(network(), with_rules(entry="teacher"), save(state, tmp_path / "plain.safetensors"))


def test_rules_that_make_one_key_of_two(tmp_path: Path) -> None:
    path = save({"a.x": torch.zeros(1), "b.x": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match=r"make 'x' out of two keys, 'b\.x' is the second one"):
        load_weights(network(), with_rules(strip=["a.", "b."]), path)


@pytest.mark.parametrize("entry", ["state_dict", "model"])
def test_usual_entries_need_no_rule(tmp_path: Path, entry: str) -> None:
    state = network(seed=7).state_dict()
    torch.save({entry: state, "epoch": 1}, tmp_path / "w.pt")
    target = network()
    load_weights(target, VIT, tmp_path / "w.pt")
    assert same(target.state_dict(), state)


SWIN = EncoderSpec(
    name="swin",
    loader="timm",
    architecture="swin_tiny_patch4_window7_224",
    arguments={"num_classes": 0, "embed_dim": 12, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "img_size": 56},
    weights=Weights(convert="swin-downsample"),
    outputs={"pooled": 48},
    output="pooled",
)


def test_a_swin_of_timm_0_5(tmp_path: Path) -> None:
    model = network(SWIN, seed=7)
    state = model.state_dict()
    assert any(key.startswith("layers.1.downsample.") for key in state)
    old = {
        re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key): value
        for key, value in state.items()
    }
    old |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}
    old |= {"layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49)}
    target = network(SWIN)
    load_weights(target, SWIN, save(old, tmp_path / "old.pt"))
    assert same(target.state_dict(), state)
    tile = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(target.eval()(tile), model.eval()(tile))
    # One of timm 0.9 goes in as it is.
    target = network(SWIN)
    load_weights(target, SWIN, save(state, tmp_path / "new.pt"))
    assert same(target.state_dict(), state)


DINO = EncoderSpec(
    name="dino",
    loader="timm",
    architecture="vit_small_patch14_reg4_dinov2",
    arguments={
        "num_classes": 0,
        "img_size": 56,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "mlp_layer": "timm.layers.SwiGLUPacked",
        "act_layer": "torch.nn.SiLU",
        "mlp_ratio": 4.0,
    },
    weights=Weights(convert="dinov2"),
    outputs={"cls": 24},
    output="cls",
    prefix_tokens=5,
)


def to_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names and shapes of Meta's repository: the class token has a position, SwiGLU is w12 and w3."""
    old = {key.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v for key, v in state.items()}
    old["register_tokens"] = old.pop("reg_token")
    of_class = torch.full((1, 1, 24), 0.25)
    old["pos_embed"] = torch.cat([of_class, old["pos_embed"]], dim=1)
    old["cls_token"] = old["cls_token"] - of_class
    return old


@pytest.mark.parametrize("with_mask_token", [True, False])
def test_a_dinov2_checkpoint(tmp_path: Path, with_mask_token: bool) -> None:
    state = network(DINO, seed=7).state_dict()
    assert "reg_token" in state
    old = to_dinov2(state) | ({"mask_token": torch.zeros(1, 24)} if with_mask_token else {})
    target = network(DINO)
    load_weights(target, DINO, save(old, tmp_path / "w.pt"))
    loaded = target.state_dict()
    assert torch.allclose(loaded.pop("cls_token"), state.pop("cls_token"), atol=1e-6)
    assert same(loaded, state)


def test_a_dinov2_grid_of_another_size_is_resampled(tmp_path: Path) -> None:
    old = to_dinov2(network(DINO, seed=7).state_dict())
    plane = torch.linspace(0, 1, 8)[None, :, None].expand(8, 8, 24)  # rises from left to right
    old["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), plane.reshape(1, 64, 24)], dim=1)
    target = network(DINO)
    load_weights(target, DINO, save(old, tmp_path / "w.pt"))
    grid = target.state_dict()["pos_embed"].reshape(4, 4, 24)
    # Centres of 4 cells in units of 8: 0.5, 2.5, 4.5, 6.5, of 7 steps; bicubic keeps a plane but at its borders.
    assert torch.allclose(grid[:, 1, 0], torch.tensor(2.5 / 7), atol=0.02)
    assert torch.allclose(grid[:, 2, 0], torch.tensor(4.5 / 7), atol=0.02)


def test_what_is_no_dinov2_checkpoint(tmp_path: Path) -> None:
    path = save({"register_tokens": torch.zeros(1, 4, 24)}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match="not a DINOv2 checkpoint that timm can convert"):
        load_weights(network(DINO), DINO, path)


PHIKON = EncoderSpec(
    name="small-phikon",
    loader="transformers",
    architecture="ViTModel",
    arguments={
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
    },
    weights=Weights(drop=("pooler.",)),
    outputs={"cls": 16},
    output="cls",
)
_NAMES_OF_TRANSFORMERS_4 = {
    r"^layers\.": "encoder.layer.",
    r"attention\.q_proj": "attention.attention.query",
    r"attention\.k_proj": "attention.attention.key",
    r"attention\.v_proj": "attention.attention.value",
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}


def to_transformers_4(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, name in _NAMES_OF_TRANSFORMERS_4.items():
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def test_the_names_of_another_version_of_transformers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    state = network(PHIKON, seed=7).state_dict()
    old = to_transformers_4(state)
    assert "encoder.layer.1.attention.attention.query.weight" in old
    old["pooler.dense.weight"] = torch.zeros(16, 16)
    for device in ("cpu", "meta"):
        target = network(PHIKON, device=device)
        load_weights(target, PHIKON, save(old, tmp_path / "w.safetensors"))
        assert same(target.state_dict(), state)
    wrong = {key: value for key, value in old.items() if key != "layernorm.bias"} | {"stranger": torch.zeros(2)}
    wrong["layernorm.weight"] = torch.zeros(5)
    with pytest.raises(EncoderError) as caught:
        load_weights(network(PHIKON), PHIKON, save(wrong, tmp_path / "wrong.safetensors"))
    assert "missing 1 (layernorm.bias); unexpected 1 (stranger)" in str(caught.value)
    assert "of another shape 1 (layernorm.weight: 5, not 16)" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_the_gates_of_a_swiglu_of_transformers_4(tmp_path: Path) -> None:
    """One layer then, two now: the gate is the first half."""
    pytest.importorskip("transformers")
    spec = PHIKON.model_copy(
        update={
            "architecture": "Dinov2Model",
            "arguments": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 16,
                "image_size": 32,
                "use_swiglu_ffn": True,
            },
        }
    )
    state = network(spec, seed=7).state_dict()
    old = {key: value for key, value in state.items() if ".mlp." not in key}
    old = {re.sub(r"attention\.([qkv])_proj", r"attention.attention.\1", key): value for key, value in old.items()}
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        old = {
            key.replace(f"attention.attention.{short}.", f"attention.attention.{name}."): v for key, v in old.items()
        }
    old = {key.replace("attention.o_proj", "attention.output.dense"): value for key, value in old.items()}
    for part in ("weight", "bias"):
        mlp = "encoder.layer.0.mlp"
        old[f"{mlp}.weights_in.{part}"] = torch.cat([state[f"{mlp}.gate_proj.{part}"], state[f"{mlp}.up_proj.{part}"]])
        old[f"{mlp}.weights_out.{part}"] = state[f"{mlp}.down_proj.{part}"]
    target = network(spec, device="meta")
    load_weights(target, spec, save(old, tmp_path / "w.safetensors"))
    assert same(target.state_dict(), state)


class Buffered(nn.Module):
    """What networks hold beside their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("position_ids", torch.arange(3), persistent=False)


def test_what_a_network_computes_by_itself_is_passed_over(tmp_path: Path) -> None:
    """Files of older versions hold position_ids, and some lack the batch counters."""
    state = {key: torch.ones(4) for key in ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")}
    state["position_ids"] = torch.zeros(3, dtype=torch.int64)
    target = Buffered()
    load_weights(target, VIT, save(state, tmp_path / "w.pt"))
    assert target.position_ids.tolist() == [0, 1, 2]
    assert target.norm.bias.tolist() == [1, 1, 1, 1]
    assert target.norm.num_batches_tracked == 0


# What does not fit


def test_wrong_weights_name_the_keys(tmp_path: Path) -> None:
    state = network().state_dict()
    state["stranger"] = state.pop("pos_embed")
    path = save(state, tmp_path / "w.safetensors")
    with pytest.raises(EncoderError, match=r"\(tiny\): keys missing 1 \(pos_embed\); unexpected 1 \(stranger\)"):
        load_weights(network(), VIT, path)


def test_no_value_is_taken_from_a_file_that_does_not_fit(tmp_path: Path) -> None:
    state = network(seed=7).state_dict()
    state["pos_embed"] = torch.zeros(1, 3, 64)
    target = network()
    with pytest.raises(EncoderError, match=r"of another shape 1 \(pos_embed: 1 x 3 x 64, not 1 x 101 x 64\)"):
        load_weights(target, VIT, save(state, tmp_path / "w.safetensors"))
    assert same(target.state_dict(), network().state_dict())


def test_a_layer_that_only_begins_like_the_head_is_not_passed_over(tmp_path: Path) -> None:
    """A norm after pooling changes the numbers, and its name begins like that of torchvision's classifier."""
    spec = VIT.model_copy(update={"architecture": "test_resnet", "outputs": {"pooled": 64}})
    model = network(spec)
    assert model.pretrained_cfg["classifier"] == "fc"
    state = {**model.state_dict(), "fc.weight": torch.zeros(3, 64)}
    load_weights(network(spec), spec, save(state, tmp_path / "good.pt"))
    with pytest.raises(EncoderError, match=r"unexpected 1 \(fc_norm\.weight\)"):
        load_weights(network(spec), spec, save({**state, "fc_norm.weight": torch.zeros(64)}, tmp_path / "bad.pt"))


def test_a_file_as_large_as_another_encoder_is_told(tmp_path: Path) -> None:
    vit_s16_m = 21.665664
    path = save({"weights": torch.zeros(int(vit_s16_m * 1e6))}, tmp_path / "w.safetensors")
    with pytest.raises(EncoderError, match=r"it has as many parameters as .*(lunit|kaiko)"):
        load_weights(network(), VIT, path)


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, ("owned",))


@pytest.mark.parametrize("name", ["evil.pt", "evil.bin", "evil.pth"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Code()}, tmp_path / name)
    with pytest.raises(EncoderError, match="which could run code"):
        load_weights(network(), VIT, tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_broken_and_missing_files(tmp_path: Path) -> None:
    def refused(path: Path, message: str, content: Any = None) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(EncoderError, match=message):
            load_weights(network(), VIT, path)

    refused(tmp_path / "text.pt", "damaged", b"hello")
    refused(tmp_path / "text.safetensors", "damaged", b"hello")
    refused(tmp_path / "empty.safetensors", "damaged", b"")
    refused(tmp_path / "absent.pt", "no such weights file")
    refused(tmp_path / "list.pt", "no table of tensors", [1, 2])
    refused(tmp_path / "epoch.pt", "no table of tensors", {"epoch": 1})
    whole = save(network().state_dict(), tmp_path / "whole.safetensors").read_bytes()
    refused(tmp_path / "cut.safetensors", "damaged", whole[: len(whole) // 2])


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = network().state_dict()
    name = next(key for key, value in state.items() if value.is_floating_point())
    state[name] = torch.full_like(state[name], torch.nan)
    with pytest.raises(EncoderError, match=rf"1 of {len(state)} tensors hold numbers that are not finite \({name}\)"):
        load_weights(network(), VIT, save(state, tmp_path / "nan.safetensors"))
