"""Three kernels, one result: numba, numpy and torch give the same bits, in any pieces."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from merge import kernels_numpy, kernels_torch
from merge.errors import MergeError
from merge.shards import from_float, to_float
from merge.tensor import check_finite, load_kernels, merge_tensor
from tests.merge.cases import (
    TASKS,
    WITH_RULE,
    Case,
    make_case,
    merge_in_pieces,
    settings_of,
)
from tests.merge.reference import splitmix64

TWINS = ("numpy", "torch")
# rows of odd lengths, one longer than a tile of the compiled loops, a vector, one entry, no entry
SHAPES = [(7, 13), (3, 1501), (17,), (2051,), (1, 1), (0, 4)]
VARIANTS = {
    "obm": [{"normalization": n, "combine": c} for n, c in
            (("none", "sum"), ("mean", "mean"), ("rank", "sum"))],
    "della": [{}, {"window": 0.5}],
    "breadcrumbs": [{}, {"outliers": 0.0}],
    "ram_plus": [{"boost": 0.5, "boost_limit": 2.0}],
    "sar": [{"normalization": n, "combine": c} for n, c in
            (("none", "sum"), ("mean", "mean"), ("rank", "sum"))],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _on_the_processor(request, monkeypatch):
    """The tests hold on machines with a GPU too; `gpu` marks the one that uses it."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(kernels_torch, "DEVICE", torch.device("cpu"))


def assert_same(one, other, context):
    """Equal bits and counts; squares are summed in another order."""
    (merged, counts), (other_merged, other_counts) = one, other
    assert merged.dtype == other_merged.dtype
    assert merged.tobytes() == other_merged.tobytes(), context
    for name in ("kept", "conflicts", "conflicts_won", "not_finite"):
        assert np.array_equal(getattr(counts, name), getattr(other_counts, name)), (name, context)
    # numba sums a tile's squares in fp32 (they are for the report), but SCE's, which become weights
    squares = {"delta_square": 1e-5, "update_square": 1e-5}
    if counts.kept_square.any():
        squares["kept_square"] = 1e-12
    assert (counts.saliency is None) == (other_counts.saliency is None)
    if counts.saliency is not None:
        squares |= {"saliency": 1e-6, "saliency_kept": 1e-6}
    for name, tolerance in squares.items():
        expected = pytest.approx(getattr(counts, name), rel=tolerance)
        assert getattr(other_counts, name) == expected, (name, context)


def cases_of(method, kinds=("smooth", "tied", "far"), shapes=SHAPES):
    for seed, shape in enumerate(shapes):
        for kind in kinds:
            case = make_case(kind, seed, shape, n_tasks=2 + seed % 2)
            if case.fits(method):
                yield case


def variants_of(method, densities):
    for variant in VARIANTS.get(method, [{}]):
        for density in densities:
            yield variant | {"density": density}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("method", WITH_RULE)
def test_numpy_and_torch_give_the_bits_of_numba(method, dtype):
    for case in cases_of(method):
        if case.base.size == 0:
            continue
        for variant in variants_of(method, (0.0, 0.3, 1.0)):
            settings = settings_of(case.parents, **variant)
            compiled = merge_in_pieces(method, case, settings, "numba", dtype=dtype)
            for twin in TWINS:
                result = merge_in_pieces(method, case, settings, twin, dtype=dtype)
                assert_same(compiled, result, (twin, case.base.shape, variant))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("method", WITH_RULE)
def test_a_gpu_gives_the_bits_of_numba(method):
    assert kernels_torch.DEVICE.type == "cuda"
    for case in cases_of(method, shapes=[(7, 13), (3, 1501), (300, 700)]):
        for variant in variants_of(method, (0.3,)):
            settings = settings_of(case.parents, **variant)
            for dtype in ("F32", "BF16"):
                compiled = merge_in_pieces(method, case, settings, "numba", dtype=dtype)
                result = merge_in_pieces(method, case, settings, "torch", dtype=dtype)
                assert_same(compiled, result, (case.base.shape, variant))


@pytest.mark.parametrize("kernels", ["numba", *TWINS])
@pytest.mark.parametrize("method", WITH_RULE)
def test_pieces_of_any_size_give_the_bits_of_one(method, kernels):
    # light training on bf16: hundreds of ties at the threshold, shared out over the pieces
    case = make_case("tied", 5, (23, 41), n_tasks=3)
    for variant in variants_of(method, (0.2,)):
        settings = settings_of(case.parents, **variant)
        whole = merge_in_pieces(method, case, settings, kernels, dtype="BF16")
        for rows in (1, 4):
            parts = merge_in_pieces(
                method, case, settings, kernels, dtype="BF16", rows_a_piece=rows
            )
            assert_same(whole, parts, (rows, variant))


@pytest.mark.parametrize("kernels", ["numba", *TWINS])
def test_bf16_parents_can_be_merged_to_fp32(kernels):
    # what is added is the same as for fp32 parents with these values; only the rounding is not done
    case = make_case("tied", 6, (9, 31))
    settings = settings_of(case.parents, density=0.4)
    for method in ("obm", "ties", "task_arithmetic"):
        from_bf16, _ = merge_in_pieces(
            method, case, settings, kernels, dtype="BF16", out_dtype="F32"
        )
        from_fp32, _ = merge_in_pieces(method, case, settings, kernels)
        assert from_bf16.tobytes() == from_fp32.tobytes()
        rounded, _ = merge_in_pieces(method, case, settings, kernels, dtype="BF16")
        assert rounded.tobytes() == from_float(from_fp32, "BF16").tobytes()


@pytest.mark.parametrize("kernels", ["numba", *TWINS])
def test_a_tensor_without_entries_stays_so(kernels):
    for method in WITH_RULE:
        for shape in ((0, 4), (4, 0)):
            case = make_case("smooth", 0, shape)
            merged, counts = merge_tensor(
                method, case.base, case.parents, case.statistics(method),
                settings_of(case.parents), kernels=kernels,
            )  # fmt: skip
            assert merged.shape == shape
            assert counts.kept.tolist() == [0, 0]


@pytest.mark.parametrize("kernels", ["numba", *TWINS])
def test_a_tensor_of_one_number_without_axes_is_merged(kernels):
    merged, _ = merge_tensor(
        "task_arithmetic",
        np.array(1, np.float32),
        {"vlm": np.array(2, np.float32), "agent": np.array(4, np.float32)},
        None,
        settings_of(TASKS[:2], (1.0, 1.0)),
        kernels=kernels,
    )
    assert merged.shape == ()
    assert merged == 5.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kernels", ["numba", *TWINS])
def test_inputs_are_left_alone_and_may_be_read_only(kernels):
    for method in WITH_RULE:
        case = make_case("smooth", 1, (5, 6))
        arrays = [case.base, *case.parents.values(), *case.vectors.values(), *case.entries.values()]
        before = [array.copy() for array in arrays]
        for array in arrays:
            # numba would compile once more for what is read-only
            array.flags.writeable = kernels == "numba"
        merge_tensor(
            method, case.base, case.parents, case.statistics(method),
            settings_of(case.parents), kernels=kernels,
        )  # fmt: skip
        assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


# ---- numbers in and out


def test_bf16_is_rounded_to_nearest_even_as_torch_rounds_it():
    # every upper half with the lower halves around a tie; what is not a number has no one rounding
    upper = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | np.uint32(low)).view(np.float32)
        values = values[~np.isnan(values)]
        expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(from_float(values, "BF16"), expected)


def test_bf16_is_decoded_as_torch_decodes_it():
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(to_float(bits, "BF16"), expected, equal_nan=True)


@pytest.mark.parametrize("kernels", ["numba", *TWINS])
@pytest.mark.parametrize("weight", [1.5, 1.25, 1.7, -0.3])
def test_merged_values_are_rounded_to_nearest_even(kernels, weight):
    # 1.5 times a number of 8 bits has 9 or 10 bits: a quarter to a half of them are ties
    values = to_float(np.arange(2**16, dtype=np.uint16), "BF16")
    values = values[np.isfinite(values)]
    case = Case(np.zeros_like(values), {"vlm": values}, {}, {})
    settings = settings_of(["vlm"], [weight])
    merged, counts = merge_in_pieces("task_arithmetic", case, settings, kernels, dtype="BF16")
    product = torch.from_numpy(values) * torch.tensor(weight)
    expected = product.bfloat16().view(torch.int16).numpy().view(np.uint16)
    changed = values != 0  # -0 is the parent's own
    assert np.array_equal(merged[changed], expected[changed])
    assert counts.not_finite == (0b100 if abs(weight) > 1 else 0)  # the largest become infinite


def test_the_random_numbers_are_those_of_splitmix64():
    # the first five for the seed 1234567 as published on rosettacode.org
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
        4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert splitmix64(1234567, 5) == published
    expected = np.array([z >> 40 for z in published]) / 2**24
    keys = np.array([1234567], np.uint64)
    assert kernels_numpy.uniform(keys[0], 0, 5).tolist() == expected.tolist()
    assert kernels_torch.uniform(keys, 0, 5)[0].tolist() == expected.tolist()
    assert kernels_torch.uniform(keys, 3, 2)[0].tolist() == expected[3:].tolist()


# ---- what is not finite


@pytest.mark.parametrize("kernels", ["numba", *TWINS])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("place", [(2, 3), (slice(3), slice(None))], ids=["one", "most"])
def test_what_is_not_finite_is_reported_with_its_role(kernels, bad, dtype, place):
    for role in ("base", "vlm", "agent"):
        case = make_case("grid", 0, (4, 5))
        {"base": case.base, **case.parents}[role][place] = bad
        for method in ("obm", "ties", "sce", "della"):
            settings = settings_of(case.parents, normalization="rank")
            _, counts = merge_in_pieces(method, case, settings, kernels, dtype=dtype)
            with pytest.raises(MergeError, match=f"^{role}: tensor w holds NaN or infinity"):
                check_finite(counts, ["base", "vlm", "agent"], "w")


@pytest.mark.parametrize("kernels", ["numba", *TWINS])
def test_infinity_in_base_and_parent_alike_is_reported_though_their_difference_is_nan(kernels):
    case = make_case("grid", 0, (4, 5))
    for tensor in (case.base, *case.parents.values()):
        tensor[1, 1] = np.inf
    settings = settings_of(case.parents, normalization="rank")
    with pytest.raises(MergeError, match=r"base: tensor layer.weight holds NaN or infinity"):
        merge_tensor("obm", case.base, case.parents, case.vectors, settings, kernels=kernels)


@pytest.mark.parametrize("kernels", ["numba", *TWINS])
def test_a_result_that_does_not_fit_is_reported(kernels):
    base = np.zeros((1, 2), np.float32)
    # fp32: 3e38 + 3e38. bf16: the largest number plus half a step is finite in fp32, but rounds up
    parents = {"vlm": np.array([[3e38, 1]], np.float32), "agent": np.array([[3e38, 1]], np.float32)}
    with pytest.raises(MergeError, match=r"layer.weight: a merged value does not fit fp32"):
        merge_tensor(
            "task_arithmetic", base, parents, None, settings_of(parents, (1, 1)), kernels=kernels
        )
    largest = to_float(np.array([[0x7F7F, 0x3F80]], np.uint16), "BF16")
    case = Case(base, {"vlm": largest, "agent": largest}, {}, {})
    settings = settings_of(case.parents, (1.0, 2.0**-8))
    _, counts = merge_in_pieces("task_arithmetic", case, settings, kernels, dtype="BF16")
    with pytest.raises(MergeError, match="does not fit bf16"):
        check_finite(counts, ["base", "vlm", "agent"], "w", "bf16")
    fits = merge_tensor("task_arithmetic", base, case.parents, None, settings, kernels=kernels)
    assert np.isfinite(fits[0]).all()


# ---- which kernels


def test_kernels_are_chosen_by_the_environment_or_by_name(monkeypatch):
    monkeypatch.delenv("OBM_KERNELS", raising=False)
    assert load_kernels().__name__ == "merge.kernels"
    monkeypatch.setenv("OBM_KERNELS", "torch")
    assert load_kernels() is kernels_torch
    assert load_kernels("numpy") is kernels_numpy
    with pytest.raises(MergeError, match="OBM_KERNELS: 'cuda' is unknown; choose numba, numpy"):
        load_kernels("cuda")


def test_torch_is_imported_by_its_own_kernels_only():
    code = (
        "import sys; from merge.tensor import load_kernels; "
        "load_kernels('numba'); load_kernels('numpy'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
