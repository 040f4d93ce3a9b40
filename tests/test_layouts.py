"""Feature files of other programs: what each layout states is found, rows are read in any order, damage is one line."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pathopipe.errors import UsageError
from pathopipe.layouts import FeatureFile, open_features

VALUES = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
XY = np.stack([np.arange(50) * 256, np.arange(50) // 7 * 256], axis=1)


def put_h5(
    path: Path,
    arrays: dict[str, Any],
    *,
    of_file: dict[str, Any] | None = None,
    of_features: dict[str, Any] | None = None,
    of_coords: dict[str, Any] | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
        file.attrs.update(of_file or {})
        for name in ("features", "feats"):
            if name in arrays:
                file[name].attrs.update(of_features or {})
        if "coords" in arrays:
            file["coords"].attrs.update(of_coords or {})
    return path


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        open_features(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_rows(file: FeatureFile, values: NDArray[Any]) -> None:
    assert np.array_equal(file.read(), values)
    for rows in ([], [0], [49, 3, 3, 17], list(range(50))[::-1]):
        assert np.array_equal(file.read(np.asarray(rows, np.intp)), values[rows])


# --- layouts -----------------------------------------------------------------------------------------------------


def test_clam(tmp_path: Path) -> None:
    path = put_h5(tmp_path / "h5_files" / "s.1.h5", {"features": VALUES, "coords": XY.astype(np.int32)})
    file = open_features(path)
    assert (file.layout, file.slide_id, file.encoder, file.n_rows, file.features) == ("clam", "s.1", "", 50, 6)
    assert (file.coord_unit, file.patch_side) == ("px_l0", None)
    check_rows(file, VALUES)
    assert np.array_equal(file.coordinates(), XY)  # type: ignore[arg-type]
    # The patches file beside it states the size at a level.
    put_h5(
        tmp_path / "patches" / "s.1.h5",
        {"coords": XY},
        of_coords={"patch_size": 256, "patch_level": 1, "downsample": np.asarray([4.0, 4.0])},
    )
    assert open_features(path).patch_side == 1024.0


def test_trident(tmp_path: Path) -> None:
    path = put_h5(
        tmp_path / "features_conch_v15" / "s.h5",
        {"features": VALUES, "coords": XY},
        of_features={"encoder": "conch_v15", "name": "s", "savetodir": ""},
        of_coords={"patch_size": 256, "patch_size_level0": 512, "target_magnification": 20},
    )
    file = open_features(path)
    assert (file.layout, file.encoder, file.coord_unit, file.patch_side) == ("trident", "conch_v15", "px_l0", 512.0)
    check_rows(file, VALUES)


def test_trident_states_size_overlap_and_magnification(tmp_path: Path) -> None:
    stated = {
        "patch_size": 224,
        "patch_size_level0": 448,
        "target_magnification": 20,
        "overlap": 32,
        "level0_width": 9000,
        "level0_height": 7000,
    }
    path = put_h5(tmp_path / "features_x" / "s.h5", {"features": VALUES, "coords": XY}, of_coords=stated)
    file = open_features(path)
    assert (file.patch_px, file.nominal_mpp, file.overlap_px, file.dims_l0) == (224, 0.5, 32, (9000, 7000))
    assert (file.coord_path, file.patch_side) == (path, 448.0)
    # The same of the patches file, where the features' own says nothing.
    bare = put_h5(tmp_path / "features_y" / "s.h5", {"features": VALUES, "coords": XY})
    put_h5(tmp_path / "patches" / "s_patches.h5", {"coords": XY}, of_coords=stated)
    file = open_features(bare)
    assert (file.patch_px, file.nominal_mpp, file.overlap_px, file.dims_l0) == (224, 0.5, 32, (9000, 7000))


@pytest.mark.parametrize(("level", "dims_l0"), [(0, (9000, 7000)), (1, None)])
def test_clam_states_the_size_of_the_slide_at_level_0_only(
    tmp_path: Path, level: int, dims_l0: tuple[int, int] | None
) -> None:
    path = put_h5(tmp_path / "h5_files" / "s.h5", {"features": VALUES, "coords": XY})
    put_h5(
        tmp_path / "patches" / "s.h5",
        {"coords": XY},
        of_coords={"patch_size": 256, "patch_level": level, "downsample": [1.0, 1.0], "level_dim": [9000, 7000]},
    )
    assert (open_features(path).dims_l0, open_features(path).patch_px) == (dims_l0, 256)


@pytest.mark.parametrize("folder", ["h5_files", "patches"])
def test_coordinates_beside_a_bare_tensor(tmp_path: Path, folder: str) -> None:
    path = tmp_path / "pt_files" / "s.1.pt"
    path.parent.mkdir()
    torch.save(torch.from_numpy(VALUES), path)
    assert open_features(path, beside=True).coordinates() is None
    other = put_h5(
        tmp_path / folder / "s.1.h5", {"coords": XY, **({"features": VALUES} if folder != "patches" else {})}
    )
    assert open_features(path).coordinates() is None
    file = open_features(path, beside=True)
    assert (file.coord_path, file.coord_unit, file.layout) == (other, "px_l0", "pt")
    assert np.array_equal(file.coordinates(), XY)  # type: ignore[arg-type]
    check_rows(file, VALUES)
    put_h5(other, {"coords": XY[:9]})
    with pytest.raises(UsageError, match=rf"{other}: 'coords' has the shape \(9, 2\) beside 50 rows"):
        open_features(path, beside=True).coordinates()


def test_tridents_folder_names_the_encoder(tmp_path: Path) -> None:
    path = tmp_path / "features_uni_v1" / "s.pt"
    path.parent.mkdir()
    torch.save(torch.from_numpy(VALUES), path)
    assert open_features(path).encoder == "uni_v1"


@pytest.mark.parametrize("shape", [(0,), (0, 6), (1, 0, 6)])
def test_an_empty_slide(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = open_features(put_h5(tmp_path / "s.h5", {"features": np.zeros(shape, np.float32)}))
    assert file.n_rows == 0
    assert file.features == (0 if shape == (0,) else 6)
    assert file.read().shape == (0, file.features)
    assert file.coordinates() is None


def test_stamp(tmp_path: Path) -> None:
    feats = VALUES.astype(np.float16)
    path = put_h5(
        tmp_path / "ctranspath-ab12cd" / "s.h5",
        {"feats": feats, "coords": XY.astype(np.float32)},
        of_file={
            "unit": "um",
            "tile_size_um": 256.0,
            "tile_size_px": 224,
            "extractor": "ctranspath",
            "feat_type": "tile",
        },
    )
    file = open_features(path)
    assert (file.patch_px, file.nominal_mpp, file.dims_l0) == (224, None, None)
    assert (file.layout, file.encoder, file.dtype, file.coord_unit, file.patch_side) == (
        "stamp",
        "ctranspath",
        "float16",
        "um",
        256.0,
    )
    check_rows(file, feats)


def test_old_stamp_states_less(tmp_path: Path) -> None:
    arrays = {"feats": VALUES, "coords": XY.astype(np.float32)}
    older = open_features(put_h5(tmp_path / "a.h5", arrays, of_file={"tile_size": 256.0, "unit": "um"}))
    assert (older.coord_unit, older.patch_side, older.encoder) == ("um", 256.0, "")
    oldest = open_features(put_h5(tmp_path / "b.h5", arrays))
    assert (oldest.layout, oldest.coord_unit, oldest.patch_side) == ("hdf5", "", None)


@pytest.mark.parametrize("feat_type", ["slide", "patient"])
def test_slide_vectors_are_no_tiles(tmp_path: Path, feat_type: str) -> None:
    assert "one vector a slide" in refused(put_h5(tmp_path / "v.h5", {"features": VALUES[0]}))
    path = put_h5(tmp_path / "w.h5", {"feats": VALUES[:1]}, of_file={"feat_type": feat_type})
    assert "one vector a slide" in refused(path)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pt(tmp_path: Path, dtype: torch.dtype, old: bool) -> None:
    tensor = torch.from_numpy(VALUES).to(dtype)
    bare, named = tmp_path / "bare.pt", tmp_path / "named.pt"
    torch.save(tensor, bare, _use_new_zipfile_serialization=not old)
    content = {"feats": tensor[None], "coords": torch.from_numpy(XY), "encoder": "gigapath"}
    torch.save(content, named, _use_new_zipfile_serialization=not old)
    expected = tensor.float().numpy()
    for path in (bare, named):
        file = open_features(path)
        assert (file.layout, file.n_rows, file.features) == ("pt", 50, 6)
        check_rows(file, expected.astype(file.dtype))
    assert open_features(bare).coordinates() is None
    assert open_features(named).encoder == "gigapath"
    assert np.array_equal(open_features(named).coordinates(), XY)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["features", "feats", "X"])
def test_npz(tmp_path: Path, key: str) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, **{key: VALUES, "coords": XY, "encoder": np.asarray("mine")})
    file = open_features(path, slide_id="other")
    assert (file.layout, file.key, file.encoder, file.slide_id) == ("npz", key, "mine", "other")
    check_rows(file, VALUES)
    assert np.array_equal(file.coordinates(), XY)  # type: ignore[arg-type]


def test_a_leading_axis_of_one_is_dropped(tmp_path: Path) -> None:
    file = open_features(put_h5(tmp_path / "s.h5", {"features": VALUES[None], "coords": XY[None]}))
    check_rows(file, VALUES)
    assert np.array_equal(file.coordinates(), XY)  # type: ignore[arg-type]


def test_many_rows_are_read_block_by_block(tmp_path: Path) -> None:
    values = np.arange(9_000 * 1024, dtype=np.float32).reshape(9_000, 1024)
    file = open_features(put_h5(tmp_path / "s.h5", {"features": values}))
    rows = np.random.default_rng(1).integers(0, 9_000, 300)
    assert np.array_equal(file.read(rows), values[rows])


# --- what is refused ---------------------------------------------------------------------------------------------


def test_wrong_keys_are_listed(tmp_path: Path) -> None:
    said = refused(put_h5(tmp_path / "s.h5", {"vectors": VALUES, "xy": XY}))
    assert "found 'vectors' (50, 6), 'xy' (50, 2)" in said
    assert "must be named features or feats or X" in said
    np.savez(tmp_path / "s.npz", other=VALUES)
    assert "found 'other'" in refused(tmp_path / "s.npz")
    torch.save({"a": torch.zeros(2, 2)}, tmp_path / "s.pt")
    assert "found 'a' (2, 2)" in refused(tmp_path / "s.pt")


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".pt"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"s{suffix}"
    if suffix == ".h5":
        put_h5(path, {"features": VALUES})
    elif suffix == ".npz":
        np.savez(path, features=VALUES)
    else:
        torch.save(torch.from_numpy(VALUES), path)
    whole = path.read_bytes()
    for length in (len(whole) // 2, 10, 0):
        path.write_bytes(whole[:length])
        assert "truncated or no" in refused(path)
    path.write_bytes(b"hello " * 100)
    assert f"truncated or no {suffix} file" in refused(path)


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = put_h5(tmp_path / "s.h5", {"features": VALUES})
    file = open_features(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match="can't be read"):
        file.read()
    path.unlink()
    with pytest.raises(UsageError, match="no such file"):
        file.read()


def test_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", features=np.asarray([{"a": 1}], dtype=object))
    assert "Python objects, which could run code" in refused(tmp_path / "s.npz")
    torch.save({"features": VALUES, "what": Path("x")}, tmp_path / "s.pt")
    assert "Python objects, which could run code" in refused(tmp_path / "s.pt")
    texts = put_h5(tmp_path / "s.h5", {"features": np.asarray([b"a", b"b"], dtype="S1")})
    assert "'features' holds object, not numbers" in refused(texts)


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 1, 5, 6), (5, 0)])
def test_odd_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert "features must be (tiles, numbers)" in refused(put_h5(tmp_path / "s.h5", {"features": np.zeros(shape)}))


def test_other_endings_and_missing_files(tmp_path: Path) -> None:
    assert "no feature file by its ending; known: .h5, .hdf5, .pt, .npz" in refused(tmp_path / "s.csv")
    assert "no such file" in refused(tmp_path / "s.h5")


def test_coordinates_of_another_length(tmp_path: Path) -> None:
    file = open_features(put_h5(tmp_path / "s.h5", {"features": VALUES, "coords": XY[:-1]}))
    with pytest.raises(UsageError, match=r"'coords' has the shape \(49, 2\) beside 50 rows"):
        file.coordinates()


@pytest.mark.shared_data
def test_real_files(shared_data: Path) -> None:
    folder = shared_data / "mil" / "tcga_bags"
    chol = open_features(folder / "TCGA-3X-AAVA-01Z-00-DX1.h5")
    assert (chol.key, chol.n_rows, chol.features, chol.coordinates()) == ("features", 180, 512, None)
    colon = open_features(folder / "TCGA-AD-6964-01Z-00-DX1.h5")
    assert (colon.key, colon.n_rows, colon.coord_unit) == ("feats", 777, "")
    xy = colon.coordinates()
    assert xy is not None
    assert xy[0].tolist() == [10240, 21504]
    with h5py.File(colon.path) as raw:
        assert np.array_equal(colon.read(np.asarray([700, 5])), raw["feats"][()][[700, 5]])
