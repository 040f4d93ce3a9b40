"""The embedding stage: chunks whole, bad tiles quarantined, times accounted for."""

import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pathopipe.cli.progress import describe_outcome
from pathopipe.config import EmbedConfig, TilesConfig
from pathopipe.embeddings import embed
from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.embed import (
    EmbedReport,
    Encoder,
    Lane,
    begin_reading,
    build_encoder,
    embed_chunks,
    judge_rows,
)
from pathopipe.errors import TileReadError, UsageError
from pathopipe.geometry import Region
from pathopipe.pipeline import SlideOutcome
from pathopipe.records import TileGrid, Tissue
from pathopipe.slide.array import ArraySlide
from pathopipe.slide.base import Slide
from pathopipe.store import EmbeddingArray, SlideStore
from pathopipe.tiles.grid import plan_grid
from pathopipe.tiles.read import TileBatch

PIXELS = np.random.default_rng(1).integers(0, 200, (256, 256, 3)).astype(np.uint8)


class Faulty(ArraySlide):
    """A slide whose tile at (32, 0) is corrupt."""

    def read(self, region: Region) -> NDArray[np.uint8]:
        if (region.x_l0, region.y_l0) == (32, 0):
            raise TileReadError("s: x 32, y 0: block 1 is corrupt")
        return super().read(region)


class Means:
    """An encoder whose numbers can be checked: mean red, then what a test plants."""

    features = 2
    identity: dict[str, Any] = {"name": "means"}  # noqa: RUF012
    about: dict[str, Any] = {}  # noqa: RUF012
    ahead = 0

    def __init__(self, planted: dict[int, float] | None = None) -> None:
        self.planted = planted or {}
        self.seen = 0
        self.batches: list[int] = []

    def allocate(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return np.empty(shape, np.uint8)

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.batches.append(len(images))
        rows = np.arange(self.seen, self.seen + len(images))
        self.seen += len(images)
        planted = [self.planted.get(int(row), 0.0) for row in rows]
        return np.stack([images[..., 0].mean(axis=(1, 2)), planted], axis=1).astype(np.float32)

    def start(self, images: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        computed = self.encode(images)
        return lambda: computed


def make(tmp_path: Path, chunk_rows: int = 10, dtype: str = "float16") -> tuple[TileGrid, EmbeddingArray]:
    slide = ArraySlide(PIXELS, mpp=0.5, slide_id="s")
    config = TilesConfig(side_px=32, min_tissue=0)
    grid = plan_grid(slide.info, (0.5, 0.5), Tissue(np.ones((4, 4), np.uint8), (8, 8), (), ()), config)
    store = SlideStore.create_or_open(tmp_path / "s.zarr", slide.info, created_by="test")
    about = {"inputs": {}}
    rows = store.create_embeddings(
        grid.name, "means", rows=len(grid), features=2, dtype=dtype, chunk_rows=chunk_rows, about=about
    )
    return grid, rows


def lane_of(rows: EmbeddingArray, encoder: Encoder, chunks: Iterable[int] | None = None, batch_size: int = 4) -> Lane:
    return Lane(rows, encoder, frozenset(range(rows.n_chunks) if chunks is None else chunks), batch_size)


def compute(slide: Slide, grid: TileGrid, lanes: list[Lane], *, threads: int, **told: Any) -> list[EmbedReport]:
    return embed_chunks(begin_reading(slide, grid, lanes, threads=threads), lanes, **told)


def run(tmp_path: Path, encoder: Means, slide_type: type[ArraySlide] = ArraySlide) -> EmbeddingArray:
    grid, rows = make(tmp_path)
    compute(slide_type(PIXELS, mpp=0.5, slide_id="s"), grid, [lane_of(rows, encoder)], threads=2)
    return rows


def test_rows_follow_the_grid(tmp_path: Path) -> None:
    rows = run(tmp_path, Means())
    truth = PIXELS[..., 0].reshape(8, 32, 8, 32).mean(axis=(1, 3)).ravel()
    assert np.allclose(rows.read_values()[:, 0], truth, rtol=1e-3)
    assert (rows.read_status() == 1).all()


def test_batches_never_cross_chunks(tmp_path: Path) -> None:
    encoder = Means()
    run(tmp_path, encoder)
    assert encoder.batches == [4, 4, 2] * 6 + [4]


def test_bad_tiles_are_quarantined_by_kind(tmp_path: Path) -> None:
    rows = run(tmp_path, Means({5: np.nan, 6: np.inf, 7: 1e6}), Faulty)
    status = rows.read_status()
    assert {int(row): int(status[row]) for row in np.flatnonzero(status != 1)} == {1: 2, 5: 3, 6: 3, 7: 4}
    assert np.isnan(rows.read_values()).all(axis=1).tolist() == (status != 1).tolist()
    assert rows.bad_chunks() == [0]


def test_a_bad_tile_leaves_its_neighbours_in_their_batch(tmp_path: Path) -> None:
    encoder = Means()
    run(tmp_path, encoder, Faulty)
    assert encoder.batches == [4, 4, 2] * 6 + [4]


def test_reports_tiles_and_faults(tmp_path: Path) -> None:
    grid, rows = make(tmp_path)
    told: list[int] = []
    slide = Faulty(PIXELS, mpp=0.5, slide_id="s")
    [report] = compute(slide, grid, [lane_of(rows, Means(), [0, 3])], threads=1, on_tiles=told.append)
    assert (report.tiles, sum(told)) == (20, 20)
    assert report.faults == ("s: x 32, y 0: block 1 is corrupt",)
    assert report.read_s > 0
    assert rows.done_chunks() == [0, 3]


@pytest.mark.parametrize(
    ("waiting_s", "model_s", "write_s", "limit"),
    [(2.0, 1.0, 0.5, "reading"), (1.0, 2.0, 0.5, "model"), (0.1, 0.2, 0.5, "writing")],
)
def test_the_longest_part_of_the_loop_is_the_limit(
    waiting_s: float, model_s: float, write_s: float, limit: str
) -> None:
    # Seconds of reading pass beside the loop: they slow it only where it waits for tiles.
    report = EmbedReport(tiles=1, read_s=9.0, model_s=model_s, waiting_s=waiting_s, write_s=write_s)
    assert report.limited_by() == limit


def test_a_loop_that_did_nothing_has_no_limit() -> None:
    assert EmbedReport().limited_by() is None


class Slow(ArraySlide):
    def read(self, region: Region) -> NDArray[np.uint8]:
        time.sleep(0.005)
        return super().read(region)


class SlowMeans(Means):
    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        time.sleep(0.02)
        return super().encode(images)


@pytest.mark.parametrize(
    ("slide_type", "encoder", "limit"), [(Slow, Means(), "reading"), (ArraySlide, SlowMeans(), "model")]
)
def test_the_times_of_a_run_show_what_is_slow(
    tmp_path: Path, slide_type: type[ArraySlide], encoder: Means, limit: str
) -> None:
    grid, rows = make(tmp_path, chunk_rows=64)
    slide = slide_type(PIXELS, mpp=0.5, slide_id="s")
    began = time.perf_counter()
    [report] = compute(slide, grid, [lane_of(rows, encoder, [0])], threads=1)
    whole = time.perf_counter() - began
    assert report.limited_by() == limit
    assert 0.8 * whole < report.model_s + report.waiting_s + report.write_s <= whole


class OneAhead(Means):
    """Like a device: results come when they are fetched, a batch is started before the last one is."""

    ahead = 1

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log
        self.n_started = 0

    def start(self, images: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        number = self.n_started
        self.n_started += 1
        self.log.append(f"start {number}")
        on_device = images.copy()

        def fetch() -> NDArray[np.float32]:
            self.log.append(f"fetch {number}")
            return super(OneAhead, self).encode(on_device)

        return fetch


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwrites the tiles of a batch as soon as the next one is asked for, as readers that are ahead do."""
    stream = embed.TileStream

    def poisoning(*arguments: Any, **settings: Any) -> Generator[TileBatch, None, None]:
        for batch in stream(*arguments, **settings):
            yield batch
            batch.images[:] = 255

    monkeypatch.setattr(embed, "TileStream", poisoning)


@pytest.mark.usefixtures("poisoned")
def test_the_next_batch_starts_before_the_last_is_fetched(tmp_path: Path) -> None:
    expected = run(tmp_path / "plain", Means())
    grid, rows = make(tmp_path)
    log: list[str] = []
    told: list[int] = []
    [report] = compute(
        ArraySlide(PIXELS, mpp=0.5, slide_id="s"),
        grid,
        [lane_of(rows, OneAhead(log))],
        threads=2,
        on_tiles=lambda n: (told.append(n), log.append("told"))[0],
    )
    n_batches = 19
    assert log[:5] == ["start 0", "start 1", "fetch 0", "told", "start 2"]
    assert [line for line in log if line.startswith("start")] == [f"start {n}" for n in range(n_batches)]
    assert [line for line in log if line.startswith("fetch")] == [f"fetch {n}" for n in range(n_batches)]
    assert (report.tiles, sum(told)) == (64, 64)
    assert np.array_equal(rows.read_values(), expected.read_values())
    assert np.array_equal(rows.read_status(), expected.read_status())


@pytest.mark.usefixtures("poisoned")
def test_a_device_that_fails_keeps_what_was_written(tmp_path: Path) -> None:
    class Failing(OneAhead):
        def start(self, images: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
            if self.n_started == 7:
                raise RuntimeError("the device is gone")
            return super().start(images)

    grid, rows = make(tmp_path)
    slide = ArraySlide(PIXELS, mpp=0.5, slide_id="s")
    with pytest.raises(RuntimeError, match="the device is gone"):
        compute(slide, grid, [lane_of(rows, Failing([]))], threads=2)
    assert rows.done_chunks() == [0, 1]


def test_what_was_finished_before_a_crash_stays(tmp_path: Path) -> None:
    class Crashing(Means):
        def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
            if self.seen >= 24:
                raise RuntimeError("the model broke")
            return super().encode(images)

    grid, rows = make(tmp_path)
    slide = ArraySlide(PIXELS, mpp=0.5, slide_id="s")
    with pytest.raises(RuntimeError, match="the model broke"):
        compute(slide, grid, [lane_of(rows, Crashing())], threads=2)
    assert rows.done_chunks() == [0, 1]


class Counting(ArraySlide):
    """Counts what is read."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.n_reads = 0

    def read(self, region: Region) -> NDArray[np.uint8]:
        self.n_reads += 1
        return super().read(region)


@pytest.mark.usefixtures("poisoned")
def test_several_encoders_share_what_is_read_and_nothing_else(tmp_path: Path) -> None:
    alone = [run(tmp_path / "a", Means()), run(tmp_path / "b", Means({3: 1.0})), run(tmp_path / "c", Means({9: 2.0}))]
    log: list[str] = []
    grid, first = make(tmp_path / "first")
    others = [make(tmp_path / name)[1] for name in ("second", "third")]
    # As a run that was stopped leaves it: each encoder has chunks of its own still to do, and batches of its own size.
    few = Means({3: 1.0})
    lanes = [lane_of(first, Means()), lane_of(others[0], few, [0, 2], 3), lane_of(others[1], OneAhead(log), [0, 6], 8)]
    slide = Counting(PIXELS, mpp=0.5, slide_id="s")
    reports = compute(slide, grid, lanes, threads=1)
    assert slide.n_reads == len(grid)
    assert [report.tiles for report in reports] == [64, 20, 14]
    assert others[0].done_chunks() == [0, 2]
    assert others[1].done_chunks() == [0, 6]
    assert few.batches == [3, 3, 3, 1] * 2
    assert np.array_equal(first.read_values(), alone[0].read_values())
    assert np.array_equal(others[0].read_values()[:10], alone[1].read_values()[:10])
    assert np.array_equal(others[1].read_values()[60:, 0], alone[2].read_values()[60:, 0])


def test_judging_rows_knows_the_limits_of_the_store() -> None:
    computed = np.array([[0, 65504], [0, 65505], [0, -1e9], [np.nan, 1e9], [1, 1]], np.float32)
    readable = np.array([True, True, True, True, False])
    assert judge_rows(computed, readable, np.dtype(np.float16)).tolist() == [1, 4, 4, 3, 2]
    assert judge_rows(computed, readable, np.dtype(np.float32)).tolist() == [1, 1, 1, 3, 2]


def test_unknown_encoders_name_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown encoder 'handcraft'; did you mean 'handcrafted'"):
        find_encoder("handcraft")
    with pytest.raises(UsageError, match="unknown encoder 'timm.'"):
        find_encoder("timm.")


def test_the_handcrafted_encoder_fits_the_protocol() -> None:
    encoder = build_encoder(find_encoder("handcrafted"), EmbedConfig(), mpp=(0.5, 0.5), threads=1)
    images = encoder.allocate((2, 64, 64, 3))
    images[:] = PIXELS[:64, :64]
    values = encoder.encode(images)
    assert values.shape == (2, encoder.features)
    assert np.array_equal(values[0], values[1])


def test_the_line_of_a_slide_says_where_time_went() -> None:
    report = EmbedReport(tiles=9, read_s=2.0, model_s=5.04, waiting_s=0.26, write_s=0.1)
    outcome = SlideOutcome(
        "s", "done", tiles=9, did=("tiles", "handcrafted"), seconds=7.0, prepare_s=1.5, report=report
    )
    said = describe_outcome(outcome)
    assert "prepare 1.5 s, read 2.0 s, model 5.0 s, waiting 0.3 s, write 0.1 s · embedding limited by model" in said
    assert "limited" not in describe_outcome(SlideOutcome("s", "done"))
