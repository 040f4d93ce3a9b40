"""``pathopipe encoders`` as a user types it: the list and its filters, what is shown of one, a row to begin with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pathopipe.embeddings.catalog import catalog, find_encoder

Cli = Callable[..., Any]

ROWS = catalog()
DOCS = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")


def names_of(out: str) -> list[str]:
    """The first column of the table."""
    return [line.split()[0] for line in out.split("\n\n")[0].splitlines()[1:]]


def test_the_list_names_all_and_fits_a_wide_terminal(cli: Cli) -> None:
    result = cli("encoders", "list")
    assert names_of(result.out) == list(ROWS)
    assert max(map(len, result.out.splitlines())) <= 120
    line = next(line for line in result.out.splitlines() if line.startswith("conch-v1.5 "))
    assert line.split()[:5] == ["conch-v1.5", "768", "512", "@", "0.5"]


@pytest.mark.parametrize(
    ("filters", "fits"),
    [
        (("--commercial",), lambda spec: spec.commercial == "yes"),
        (("--open",), lambda spec: spec.gated == "no"),
        (("--license", "apache"), lambda spec: "apache" in spec.license.lower()),
        (("--max-params-m", "22"), lambda spec: spec.loader == "handcrafted" or (spec.params_m or 1e9) <= 22),
        (("--commercial", "--open", "--license", "MIT"), lambda spec: spec.name == "midnight-12k"),
    ],
)
def test_filters(cli: Cli, filters: tuple[str, ...], fits: Callable[[Any], bool]) -> None:
    wanted = [name for name, spec in ROWS.items() if fits(spec)]
    assert 0 < len(wanted) < len(ROWS)
    assert names_of(cli("encoders", "list", *filters).out) == wanted
    documents = json.loads(cli("encoders", "list", *filters, "--json").out)
    assert [document["name"] for document in documents] == wanted


def test_a_list_by_size_says_what_it_can_not_judge(cli: Cli) -> None:
    result = cli("encoders", "list", "--max-params-m", "100000")
    unknown = [name for name, spec in ROWS.items() if spec.params_m is None and spec.loader != "handcrafted"]
    assert result.err == f"left out, as their size is not known: {', '.join(unknown)}\n"
    assert names_of(result.out) == [name for name in ROWS if name not in unknown]


def test_an_empty_list_says_so(cli: Cli) -> None:
    result = cli("encoders", "list", "--license", "no such licence")
    assert (result.code, result.out) == (0, "")
    assert "no encoder fits" in result.err


def test_show_tells_the_recipe_the_terms_and_the_ways_to_the_weights(cli: Cli) -> None:
    out = " ".join(cli("encoders", "show", "prov-gigapath").out.split())
    assert out.startswith("prov-gigapath: Prov-GigaPath what ViT-g/16")
    assert "vit_giant_patch14_dinov2 by timm, 1134.95 M parameters, 197 tokens (1 before the patches)" in out
    assert "256 px at 0.5 um/px" in out
    assert (
        "shorter side resized to 256 px (bicubic, antialias), then 224 px cut from the middle; "
        "mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in out
    )
    assert "cls: 1,536 numbers, the class token" in out
    assert "prov-gigapath.cls-mean (3,072 numbers)" in out
    assert "licence Apache-2.0, research terms; commercial use: unclear" in out
    assert "download accept the terms first" in out
    assert "ports that resize straight to 224 change the scale" in out
    assert "https://huggingface.co/prov-gigapath/prov-gigapath" in out
    assert "hf auth login" in out
    assert "--set embed.weights=FILE" in out
    assert "--set embed.weights_dir=DIR with prov-gigapath.safetensors" in out
    assert "prov-gigapath/prov-gigapath/pytorch_model.bin" in out


@pytest.mark.parametrize("name", ROWS)
def test_every_row_can_be_shown(cli: Cli, name: str) -> None:
    result = cli("encoders", "show", name)
    assert result.code == 0
    assert result.out.startswith(f"{name}: {ROWS[name].title}\n")
    assert ROWS[name].license in result.out
    assert "How to get the weights" in result.out or name == "handcrafted"


def test_show_of_another_output(cli: Cli) -> None:
    out = cli("encoders", "show", "virchow2.cls").out
    assert "cls: 1,280 numbers, the class token" in out
    assert "virchow2.cls-mean (2,560 numbers)" in out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("handcrafted", "No weights are needed."),
        ("midnight-12k", "pip install 'pathopipe[hub]'"),
        ("rudolfv-2", "--set embed.trust_remote_code=true"),
        ("rudolfv-2.cls", "--set embed.weights_dir=DIR with such a copy as rudolfv-2 or Aignostics/RudolfV-2 in it"),
        ("isight", "it can't run here"),
        ("path-foundation", "pathopipe import features"),
        ("kimianet", "KimiaNetPyTorchWeights.pth"),
        ("timm.vit_tiny_patch16_224", "timm's own recipe"),
    ],
)
def test_show_tells_what_is_special(cli: Cli, name: str, said: str) -> None:
    assert said in cli("encoders", "show", name).out


def test_shown_rows_can_be_pasted(cli: Cli, tmp_path: Path) -> None:
    networks = [name for name in ROWS if name != "handcrafted"]
    path = tmp_path / "mine.yaml"
    path.write_text("".join(cli("encoders", "show", name, "--yaml").out for name in networks))
    mine = catalog(path)
    for name in networks:
        assert mine[f"my-{name}"].model_copy(update={"name": name}) == ROWS[name]
    assert {"resize", "mean", "std"} <= set(yaml.load(path.read_text(), yaml.CSafeLoader)["my-uni"]["transform"])
    listed = cli("encoders", "list", "--catalog", path)
    assert names_of(listed.out) == [*ROWS, *(f"my-{name}" for name in networks)]
    assert cli("encoders", "show", "my-uni", "--catalog", path).out.startswith("my-uni: UNI\n")


def test_a_shown_row_keeps_the_output_that_was_asked_for(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(cli("encoders", "show", "virchow2.cls", "--yaml").out)
    spec = find_encoder("my-virchow2", path)
    assert (spec.output, spec.features) == ("cls", 1280)


def test_docs_show_the_catalogue(cli: Cli) -> None:
    table = [line for line in DOCS.split("## All")[1].splitlines() if line.startswith("| `")]
    expected = [
        f"| `{spec.name}` | {spec.summary} | {spec.features} | {spec.tile_px} @ {spec.mpp:g} | "
        f"{'' if spec.params_m is None else f'{spec.params_m:.1f}'} | {spec.license} | {spec.commercial} | "
        f"{spec.gated} | {spec.loader} |"
        for spec in ROWS.values()
    ]
    assert table == expected
    assert f"{len(ROWS)} encoders have a name" in DOCS


@pytest.mark.parametrize("command", ["list --commercial --open", "show midnight-12k"])
def test_docs_show_what_is_printed(cli: Cli, command: str) -> None:
    shown = DOCS.split(f"$ pathopipe encoders {command}\n")[1].split("```")[0]
    assert shown == cli("encoders", *command.split()).out


def test_the_row_in_the_docs_is_one(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(DOCS.split("```yaml\n")[1].split("```")[0])
    spec = find_encoder("my-vit.mean", path)
    assert (spec.features, spec.commercial, spec.weights.strip) == (384, "yes", ("backbone.",))
    shown = DOCS.split("$ pathopipe encoders check my-vit --catalog mine.yaml\n")[1].split("```")[0]
    result = cli("encoders", "check", "my-vit", "--catalog", path)
    measured = "one bright pixel"  # its last digits differ between machines
    assert shown.split(measured)[0] == result.out.split(measured)[0]


def test_show_as_json(cli: Cli) -> None:
    document = json.loads(cli("encoders", "show", "uni.mean", "--json").out)
    assert (document["name"], document["output"], document["features"]) == ("uni.mean", "mean", 1024)
    assert document["transform"]["filter"] == "bilinear"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "virchow3"), "unknown encoder 'virchow3'; did you mean 'virchow"),
        (("show", "uni.patches"), "encoder 'uni' has no output 'patches'; it offers uni.cls"),
        (("show", "timm.VIT"), "architectures of timm have small letters"),
        (("show", "timm.vit_tiny_patch16_224", "--yaml"), "is no row"),
        (("show", "uni", "--json", "--yaml"), "--json and --yaml: give one of them"),
        (("list", "--catalog", "nowhere.yaml"), "nowhere.yaml: the file of encoders can't be read"),
    ],
)
def test_wrong_use_is_one_line(cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    result = cli("encoders", *arguments)
    assert result.code == 2
    assert result.err.startswith("pathopipe: ")
    assert said in result.err
    assert result.err.count("\n") == 1
