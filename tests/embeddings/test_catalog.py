"""The catalogue: rows that agree with themselves and with the table they were taken from, and rows of a user's own."""

import csv
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from pathopipe.embeddings.catalog import catalog, find_encoder
from pathopipe.embeddings.handcrafted import FEATURE_NAMES
from pathopipe.embeddings.recipe import EncoderSpec, Transform
from pathopipe.errors import UsageError

ROWS = catalog()
WRITTEN = yaml.load(  # as it stands in the file, without defaults
    files("pathopipe.embeddings").joinpath("catalog.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader
)
NETWORKS = {name: spec for name, spec in ROWS.items() if spec.loader != "handcrafted"}

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
AS_IT_IS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# Only the picture tower is built: millions of parameters as the table's note counts them.
TOWERS = {"plip": 87.456 + 0.393, "quiltnet-b-32": 87.849, "quiltnet-b-16": 86.193, "omiclip": 306.725}


def transform_of(name: str) -> Transform:
    transform = ROWS[name].transform
    assert transform is not None
    return transform


def colours_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return transform_of(name).mean, transform_of(name).std


def input_px_of(name: str) -> int:
    return transform_of(name).crop_px or transform_of(name).resize_px or ROWS[name].tile_px


# Rows among themselves


def test_the_handcrafted_row_is_what_the_code_computes() -> None:
    spec = ROWS["handcrafted"]
    assert next(iter(ROWS)) == "handcrafted"
    assert (spec.loader, spec.dtype, spec.tile_px, spec.mpp) == ("handcrafted", "float32", 256, 0.5)
    assert spec.outputs == {"pooled": len(FEATURE_NAMES)}


@pytest.mark.parametrize("spec", NETWORKS.values(), ids=NETWORKS)
def test_outputs_follow_from_the_class_token_and_the_tokens(spec: EncoderSpec) -> None:
    if "cls" not in spec.outputs:
        assert "cls-mean" not in spec.outputs
        return
    assert spec.prefix_tokens >= 1
    assert spec.tokens is not None
    width, patches = spec.outputs["cls"], spec.tokens - spec.prefix_tokens
    assert spec.outputs == {"cls": width, "mean": width, "cls-mean": 2 * width, "tokens": patches * width}
    assert round(patches**0.5) ** 2 == patches, "patches of a square tile make a square"


@pytest.mark.parametrize("spec", NETWORKS.values(), ids=NETWORKS)
def test_patches_fill_the_input(spec: EncoderSpec) -> None:
    stated = re.search(r"/(\d+)\b", spec.summary)
    if stated is None or spec.tokens is None:
        return
    assert spec.tokens == spec.prefix_tokens + (input_px_of(spec.name) // int(stated[1])) ** 2


@pytest.mark.parametrize("spec", NETWORKS.values(), ids=NETWORKS)
def test_a_row_tells_what_a_user_must_know(spec: EncoderSpec) -> None:
    assert spec.title, "title"
    assert spec.paper, "paper"
    assert spec.summary, "summary"
    assert len(spec.summary) <= 100
    assert "\n" not in spec.summary
    assert spec.license, "license"
    assert spec.notes, "notes"
    assert spec.weights.hub or spec.access, "a way to the weights"
    assert re.fullmatch(r"([\w.-]+/[\w.-]+)?", spec.weights.hub)


@pytest.mark.parametrize("spec", NETWORKS.values(), ids=NETWORKS)
def test_recipes_are_given_whole(spec: EncoderSpec) -> None:
    row = WRITTEN[spec.name]
    assert {"resize", "resize_px", "filter", "mean", "std"} <= set(row["transform"])
    assert {"tile_px", "mpp", "outputs", "output", "commercial", "gated"} <= set(row)


@pytest.mark.parametrize("spec", NETWORKS.values(), ids=NETWORKS)
def test_rules_for_keys_leave_something(spec: EncoderSpec) -> None:
    rules = spec.weights
    for pattern in rules.rename:
        re.compile(pattern)
    for kept in rules.keep:  # keep is looked at before strip: what is stripped must be how a kept key begins
        assert not kept.startswith(rules.drop), "drop would take all that keep leaves"
        assert not rules.strip or kept.startswith(rules.strip)


def test_gated_linear_units_use_silu() -> None:
    packed = [spec for spec in ROWS.values() if "SwiGLU" in str(spec.arguments.get("mlp_layer"))]
    assert {spec.name for spec in packed} == {"uni2-h", "virchow", "virchow2", "h0-mini"}
    assert all(spec.arguments["act_layer"] == "torch.nn.SiLU" for spec in packed)


def test_dinov2_is_not_left_at_518_px() -> None:
    rows = [spec for spec in ROWS.values() if spec.loader in ("timm", "torch") and "dinov2" in spec.architecture]
    assert len(rows) >= 15
    for spec in rows:
        assert spec.arguments.get("img_size") == 224 or spec.arguments.get("dynamic_img_size"), spec.name


def test_mean_and_std_of_families_that_others_mix_up() -> None:
    lunit = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
    bioptimus = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
    hibou = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
    for name in ROWS:
        if name.startswith("lunit-"):
            assert colours_of(name) == lunit, name
        if name.startswith(("h-optimus-", "h0-mini")):
            assert colours_of(name) == bioptimus, name
        if name.startswith("hibou-"):
            assert colours_of(name) == hibou, name
        if name.startswith(("kaiko-", "midnight-", "musk")):
            assert colours_of(name) == HALF, name
        if name.startswith(("pathoduet", "path-foundation", "remedis")):
            assert colours_of(name) == AS_IT_IS, name
    for name in ("uni", "uni2-h", "conch-v1.5", "virchow2", "prov-gigapath", "openmidnight", "kimianet"):
        assert colours_of(name) == IMAGENET, name
    for name in ("conch-v1", "plip", "quiltnet-b-32", "biomedclip", "omiclip"):
        assert colours_of(name) == OPENAI, name


@pytest.mark.parametrize(
    ("name", "tile_px", "mpp", "resize_px", "network_px"),
    [
        ("uni", 256, 0.5, 224, 224),
        ("virchow", 224, 0.5, 224, 224),
        ("prov-gigapath", 256, 0.5, 256, 224),
        ("h-optimus-0", 224, 0.5, 224, 224),
        ("lunit-dino-s16", 224, 0.5, 248, 224),
        ("conch-v1", 512, 0.5, 448, 448),
        ("conch-v1.5", 512, 0.5, 448, 448),
        ("gpfm", 512, 0.25, 224, 224),
        ("ctranspath", 224, 1.0, 224, 224),
        ("retccl", 256, 1.0, 256, 256),
        ("kimianet", 1000, 0.5, None, 1000),
    ],
)
def test_fields_of_view(name: str, tile_px: int, mpp: float, resize_px: int | None, network_px: int) -> None:
    assert (ROWS[name].tile_px, ROWS[name].mpp) == (tile_px, mpp)
    assert (transform_of(name).resize_px, input_px_of(name)) == (resize_px, network_px)


@pytest.mark.parametrize(
    ("name", "features", "first_patch"),
    [
        *(("uni", 1024, 1), ("uni2-h", 1536, 9), ("virchow", 2560, 1), ("virchow2", 2560, 5), ("h0-mini", 1536, 5)),
        *(("h-optimus-0", 1536, 5), ("hibou-b", 768, 5), ("midnight-12k", 3072, 1), ("rudolfv-2", 3072, 9)),
        *(("prov-gigapath", 1536, 1), ("virchow2.cls", 1280, 5), ("dinov3-vit-l16", 1024, 5)),
    ],
)
def test_what_is_taken_and_where_patches_begin(name: str, features: int, first_patch: int) -> None:
    spec = find_encoder(name)
    assert (spec.features, spec.prefix_tokens) == (features, first_patch)


# Against the table


@pytest.fixture(scope="module")
def table(shared_data: Path) -> dict[str, dict[str, str]]:
    with (shared_data.parent / "reference" / "encoders.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "tile" and row["weights_public"] == "yes"]
    return {row["name"].lower(): row for row in rows}


Table = dict[str, dict[str, str]]


@pytest.mark.shared_data
def test_every_public_tile_encoder_is_there(table: Table) -> None:
    assert set(NETWORKS) == set(table)
    assert len(NETWORKS) == 72


@pytest.mark.shared_data
def test_numbers_agree_with_the_table(table: Table) -> None:
    for name, row in table.items():
        spec = ROWS[name]
        assert spec.features == int(row["embedding_dim"]), name
        assert spec.features == int(row["measured_dim"] or spec.features), name
        assert spec.mpp == float(row["recommended_mpp"] or 0.5), name
        assert spec.precision == row["autocast_dtype"], name
        assert input_px_of(name) == int(row["input_px"]), name
        variants = {int(found) for found in re.findall(r"\d{3,}", row["embedding_dim_variants"])}
        if name not in ("musk", "mascaret"):  # theirs comes from another way of calling the authors' code
            assert variants <= set(spec.outputs.values()), name
        if "cls" in spec.outputs and row["n_register_tokens"]:
            assert spec.prefix_tokens == 1 + int(row["n_register_tokens"]), name


@pytest.mark.shared_data
def test_parameters_agree_with_the_table(table: Table) -> None:
    for name, row in table.items():
        params_m = ROWS[name].params_m
        if name in TOWERS:
            assert params_m == pytest.approx(TOWERS[name], rel=1e-3), name
        elif name == "medsiglip-448":  # the table has the text tower in it, and was not measured
            assert params_m == pytest.approx(428.565, rel=1e-3)
        elif name == "conch-v1.5":  # measured with positions of 224 px; there are 588 x 1024 more of them at 448
            assert params_m == pytest.approx(float(row["measured_params_m"]) + 0.602, rel=1e-3)
        elif name == "conch-v1":  # its trunk, and what is between that and the visual tower but the caption pooler
            trunk_m, tower_m = (
                float(found) for found in re.findall(r"(?:trunk|tower) ([\d.]+)M", row["verified_how"])[::-1]
            )
            assert trunk_m < params_m < tower_m
        elif row["measured_params_m"]:
            assert params_m == pytest.approx(float(row["measured_params_m"]), rel=1e-3), name
        elif params_m is not None:
            assert params_m == pytest.approx(float(row["params_millions"]), rel=0.03), name


@pytest.mark.shared_data
def test_tokens_agree_with_the_table(table: Table) -> None:
    for name, row in table.items():
        measured = re.match(r"\d+(?!x)\b", row["measured_tokens"])
        if measured is None:
            continue
        tokens = ROWS[name].tokens
        assert tokens is not None, name
        if row["verified_how"].endswith("at 256 px"):
            tokens += (256 // 16) ** 2 - (224 // 16) ** 2
        assert tokens == int(measured[0]), name


@pytest.mark.shared_data
def test_transforms_agree_with_the_table(table: Table) -> None:
    for name, row in table.items():
        transform = transform_of(name)
        for ours, key in ((transform.mean, "mean"), (transform.std, "std")):
            if row[key][0].isdigit():
                assert ours == tuple(map(float, row[key].split(","))), name
        if row["interpolation"].startswith(("bi",)):
            assert row["interpolation"].startswith(transform.filter), name
        rule = row["resize_and_crop_rule"]
        if rule.startswith("resize short side"):
            assert transform.resize == "short", name
        if "resize to exactly" in rule:
            assert (transform.resize, transform.crop_px) == ("exact", None), name
        if re.search(r"cent(re|er)-crop (\d+)", rule) and "TRIDENT adds" not in rule:
            assert transform.crop_px == input_px_of(name), name
        else:
            assert transform.crop_px in (None, transform.resize_px) or name == "path-foundation", name


@pytest.mark.shared_data
def test_terms_agree_with_the_table(table: Table) -> None:
    for name, row in table.items():
        spec = ROWS[name]
        assert spec.commercial == row["commercial_use"], name
        assert spec.gated == row["gated"], name
        spdx = re.match(r"(Apache-2\.0|MIT|CC-BY-NC-ND-4\.0|CC-BY-NC-4\.0|BSD-3-Clause|A?GPL-3\.0)", row["license"])
        if spdx:
            assert spec.license.startswith(spdx[0]), name
        # Weights that fit what is built: timm's of DINOv3, and TITAN's repository, which has the code of CONCH v1.5.
        if not row["hub_id"].startswith("none") and not name.startswith("dinov3-") and name != "conch-v1.5":
            assert spec.weights.hub == row["hub_id"].removesuffix(" (mirror)"), name


@pytest.mark.shared_data
def test_arguments_of_timm_are_the_tables(table: Table) -> None:
    hints = {"pretrained_tag", "file", "import"}
    for name, row in table.items():
        if ROWS[name].loader != "timm" or name in ("gigapath-flash", "prost40m"):  # no stock architecture in the table
            continue
        stated = json.loads(row["loader_kwargs"])
        assert ROWS[name].arguments == {key: value for key, value in stated.items() if key not in hints}, name
        assert ROWS[name].architecture == row["architecture"], name


# Names


def test_an_output_is_part_of_the_name() -> None:
    spec = find_encoder("conch-v1.5.pooled")
    assert (spec.name, spec.output, spec.features) == ("conch-v1.5.pooled", "pooled", 768)
    tokens = find_encoder("virchow2.tokens")
    assert (tokens.name, tokens.features) == ("virchow2.tokens", 256 * 1280)
    assert tokens.model_copy(update={"name": "virchow2", "output": "cls-mean"}) == ROWS["virchow2"]


def test_any_architecture_of_timm_has_a_name() -> None:
    spec = find_encoder("timm.vit_tiny_patch16_224")
    assert (spec.loader, spec.architecture, spec.transform) == ("timm", "vit_tiny_patch16_224", None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Virchow2", "unknown encoder 'Virchow2'; did you mean 'virchow2'"),
        ("uni2h", "did you mean 'uni2-h'"),
        ("conch-v1.6", "unknown encoder 'conch-v1.6'; did you mean 'conch-v1.5'"),
        ("handcraft", "did you mean 'handcrafted'"),
        ("timm.", "unknown encoder 'timm.'"),
        ("qqq", "`pathopipe encoders list` names them"),
        ("uni.clas", r"encoder 'uni' has no output 'clas'; it offers uni.cls \(1024 numbers\), uni.mean"),
        ("plip.cls", r"encoder 'plip' has no output 'cls'; it offers plip.pooled \(512 numbers\)$"),
        ("uni.", "encoder 'uni' has no output ''"),
    ],
)
def test_a_wrong_name_is_answered_with_a_near_one(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_encoder(name)


# Rows of a user's own

MINE: dict[str, Any] = {
    "loader": "timm",
    "architecture": "vit_tiny_patch16_224",
    "arguments": {"num_classes": 0},
    "outputs": {"cls": 192, "mean": 192},
    "output": "cls",
}


def write_rows(folder: Path, **rows: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(dict(rows)))
    return path


def test_a_users_row_joins_the_shipped_ones(tmp_path: Path) -> None:
    path = write_rows(tmp_path, mine=MINE)
    assert list(catalog(path))[-2:] == [*list(ROWS)[-1:], "mine"]
    spec = find_encoder("mine.mean", path)
    assert (spec.name, spec.output, spec.features) == ("mine.mean", "mean", 192)
    assert (spec.tile_px, spec.mpp, spec.commercial, spec.gated) == (256, 0.5, "unclear", "no")
    assert find_encoder("uni", path) is ROWS["uni"]
    with pytest.raises(UsageError, match="unknown encoder 'mine'"):
        find_encoder("mine")


def test_no_resize_needs_no_size(tmp_path: Path) -> None:
    spec = find_encoder("mine", write_rows(tmp_path, mine={**MINE, "transform": {"resize": "none"}}))
    assert spec.transform is not None and spec.transform.resize_px is None


def test_yes_and_no_need_no_quotes(tmp_path: Path) -> None:
    path = write_rows(tmp_path, mine={**MINE, "commercial": True, "gated": False})
    spec = find_encoder("mine", path)
    assert (spec.commercial, spec.gated) == ("yes", "no")


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("uni", MINE, "encoder 'uni' is one of pathopipe's own"),
        ("timm.mine", MINE, "names that begin with 'timm.'"),
        ("mine.cls", MINE, "is read as an output"),
        ("Mine", MINE, "name 'Mine': use small letters"),
        ("mine", {**MINE, "licence": "MIT"}, "unknown key 'licence'; did you mean 'license'"),
        ("mine", {**MINE, "transform": {"resise": "short"}}, "unknown key 'transform.resise'; did you mean 'resize'"),
        ("mine", {**MINE, "weights": {"hubb": "a/b"}}, "unknown key 'weights.hubb'; did you mean 'hub'"),
        ("mine", {**MINE, "loader": "tim"}, "loader: input should be .*'timm'.*, got 'tim'"),
        ("mine", {**MINE, "loader": "handcrafted"}, "loader handcrafted is no network"),
        ("mine", {**MINE, "output": "cls-mean"}, r"output 'cls-mean' is not among outputs \(cls, mean\)"),
        ("mine", {**MINE, "outputs": {"clas": 1}}, "outputs.clas: input should be 'pooled', 'cls'"),
        ("mine", {"loader": "timm"}, "'outputs' is missing; 'output' is missing"),
        ("mine", {**MINE, "arguments": {"init_values": "1e-5"}}, "'1e-5' in arguments is text to YAML"),
        ("mine", {**MINE, "arguments": {"vision_cfg": {"eps": ["1E-6"]}}}, "'1E-6' in arguments is text to YAML"),
        (
            "mine",
            {**MINE, "transform": {"resize": "none", "resize_px": 9 * 16}},
            "transform: resize_px goes with resize",
        ),
        ("mine", {**MINE, "transform": {"resize_px": 160, "crop_px": 224}}, "crop_px 224 can't be cut from 160 px"),
        ("mine", {**MINE, "transform": {"std": [0, 0.2, 0.2]}}, "mean and std are of pixels from 0 to 1"),
        ("mine", {**MINE, "transform": {"mean": [170, 120, 160]}}, "mean and std are of pixels from 0 to 1"),
        ("mine", {**MINE, "tile_px": 1_000_000}, "tile_px: input should be less than or equal to 8192"),
        ("mine", {**MINE, "outputs": {"cls": 0}}, "outputs: say how many numbers each has"),
        ("mine", {**MINE, "weights": {"rename": {"(": "b"}}}, "is no regular expression"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, name: str, row: dict[str, Any], said: str) -> None:
    path = write_rows(tmp_path, **{name: row})
    with pytest.raises(UsageError, match=said) as caught:
        catalog(path)
    assert str(caught.value).startswith(f"{path}: encoder '{name}'")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "holds a row of settings under each name"),
        ("mine: timm\n", "holds a row of settings under each name"),
        ("", "holds a row of settings under each name"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        catalog(path)
    with pytest.raises(UsageError, match="can't be read"):
        catalog(tmp_path / "nowhere.yaml")


def test_names_stand_once_in_the_file_and_in_its_order() -> None:
    text = files("pathopipe.embeddings").joinpath("catalog.yaml").read_text(encoding="utf-8")
    assert re.findall(r"^([^\s#][^:]*):", text, re.MULTILINE) == list(ROWS)
    assert catalog() is catalog()


def test_importing_reads_no_rows() -> None:
    code = (
        "import pathopipe.embeddings.catalog as c, sys; print(c._shipped.cache_info().currsize, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0 False\n"
