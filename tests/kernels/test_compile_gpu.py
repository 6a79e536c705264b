"""Every kernel compiles for the GPUs it is for, without one: no spills, shared memory that fits, 16-byte accesses."""

import importlib.metadata

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


from benchmarks.gpu import cuda_resources, resources
from benchmarks.gpu.resource_cases import CASES, FUSED, ONES
from benchmarks.gpu.resources import PINNED, SHARED, TABLE, Resources, Variant

# float32 rows beside bfloat16 ones: four elements a thread, so the narrower ones move 8 bytes
MIXED = {case for case in CASES if "mixed" in case or case.startswith("step")}


MAPS = {case for case in CASES if "map" in case}

# no spill: the array in which float64's sine would reduce an angle of 100,000 and more, 40 or 48 bytes by version
LOCAL = {"step, 32x32 latents, everything": 48}


@pytest.fixture(scope="module")
def found() -> dict[Variant, Resources]:
    return resources.compile_all(resources.variants())


def test_the_table_is_no_longer_than_it_may_be() -> None:
    assert len(resources.variants()) <= 69
    assert {chip for _, chip in ((v.case, v.chip) for v in resources.variants())} == {80, 90, 100}


@pytest.mark.slow
@pytest.mark.parametrize("chip", SHARED)
def test_nothing_spills_and_everything_fits(found: dict[Variant, Resources], chip: int) -> None:
    for case in CASES:
        got = found[Variant(case, chip)]
        assert got.local <= LOCAL.get(case, 0), case
        assert got.shared <= SHARED[chip], case
        assert 0 < got.registers <= 255, case


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_rows_move_in_16_bytes(found: dict[Variant, Resources], case: str) -> None:
    kernel = CASES[case][0]
    for chip in SHARED:
        got = found[Variant(case, chip)]
        assert got.wide_loads > 0, case
        assert got.wide_stores > 0, case
        if case not in MIXED:
            # what is narrow is one number: the lane, the offset, partial scores, moves and indices are read; a partial
            # score, the mean and the ticket written. A map has more offsets: two loads under Triton 3.9, four under
            # 3.6; cached branches have two indices a row
            assert got.narrow_loads <= (6 if case in MAPS or "cached" in case else 4), case
            assert got.narrow_stores <= (3 if kernel == FUSED else 0), case


@pytest.mark.slow
def test_sizes_of_one_compile() -> None:
    ones = resources.compile_all([Variant(case, 90) for case in ONES])
    for variant, got in ones.items():
        assert got.local <= max(LOCAL.values()), variant
        assert 0 < got.registers <= 255, variant


@pytest.mark.slow
def test_nothing_has_changed_since_the_table_was_written(found: dict[Variant, Resources]) -> None:
    if importlib.metadata.version("triton") != PINNED:
        pytest.skip(f"the table is that of Triton {PINNED}")
    kept, _, _ = TABLE.read_text().partition("\n## ")
    assert resources.table(found) == kept, "make resources, and look at the difference"


@pytest.fixture(scope="module")
def compaction() -> cuda_resources.Found:
    if (nvcc := cuda_resources.nvcc()) is None:
        pytest.skip("there is no nvcc")
    return cuda_resources.compile_all(nvcc)


@pytest.mark.slow
def test_compaction_spills_nothing_and_a_whole_block_fits(compaction: cuda_resources.Found) -> None:
    assert {(kernel, chip) for kernel in cuda_resources.KERNELS for chip in (80, 90)} <= set(compaction)
    for place, taken in compaction.items():
        assert taken.stack == taken.spill_stores == taken.spill_loads == 0, place
        assert 0 < taken.registers * cuda_resources.THREADS <= cuda_resources.FILE, place
        assert taken.shared <= 48 * 1024, place  # more would have to be asked for


@pytest.mark.slow
def test_compaction_has_not_changed_since_the_table_was_written(compaction: cuda_resources.Found) -> None:
    if cuda_resources.release(cuda_resources.nvcc()) != cuda_resources.PINNED:
        pytest.skip(f"the table is that of nvcc {cuda_resources.PINNED}")
    text = cuda_resources.table(compaction)
    assert TABLE.read_text().endswith(f"\n\n{text}"), "make resources, and look at the difference"
