"""Randomised spectra against LAPACK's, a block of rows at a time."""

import numpy as np
import pytest

from merge.spectrum import leading_spectrum, multiply, multiply_transposed, subspace_energy


def blocks_of(matrix, rows=37):
    return lambda: (matrix[i : i + rows] for i in range(0, len(matrix), rows))


def falling(decay, shape=(600, 540), seed=0):
    """A matrix with singular values 1, 2^-decay, 3^-decay, ..."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(shape[0], min(shape))))[0]
    right = np.linalg.qr(rng.normal(size=(shape[1], min(shape))))[0]
    values = np.arange(1, min(shape) + 1, dtype=np.float64) ** -decay
    return (left * values @ right.T).astype(np.float32)


# iid is the worst case: the spectrum of noise hardly falls, and the 16th value is near the 60th
@pytest.mark.parametrize(("decay", "tolerance"), [(1.0, 1e-5), (0.5, 1e-3), (None, 0.03)])
def test_a_randomised_spectrum_errs_by_less_than_stated(decay, tolerance):
    matrix = falling(decay) if decay else np.random.default_rng(1).normal(size=(600, 540))
    matrix = matrix.astype(np.float32)
    exact = np.linalg.svd(matrix, compute_uv=False)[:16]
    found = leading_spectrum(blocks_of(matrix), matrix.shape, 16, exact=0)
    assert found.values == pytest.approx(exact, rel=tolerance)
    assert (found.values <= exact * (1 + 1e-5)).all()  # a projection loses, and never adds
    for basis in (found.left, found.right):
        assert basis.shape[1] == 16
        assert basis.T @ basis == pytest.approx(np.eye(16), abs=1e-4)


def test_the_energy_of_an_update_in_a_randomised_subspace_is_near_that_in_the_exact_one():
    base, update = falling(0.5), np.random.default_rng(2).normal(size=(600, 540))
    update = (update + 30 * falling(0.5)).astype(np.float32)  # some of it in the principal part
    exact, found = (
        leading_spectrum(blocks_of(base), base.shape, 16, exact=limit) for limit in (10**4, 0)
    )
    energies = [subspace_energy(blocks_of(update), s.left, s.right) for s in (exact, found)]
    by_hand = np.linalg.norm(exact.left.T @ update @ exact.right) ** 2
    assert energies[0] == pytest.approx(by_hand, rel=1e-4)
    # the last directions, which lie close to the next, differ a little
    assert energies[1] == pytest.approx(energies[0], rel=0.02)


def test_a_narrow_matrix_is_exact_and_a_small_one_has_fewer_values():
    matrix = falling(0.2, (90, 7))
    found = leading_spectrum(blocks_of(matrix), (90, 7), 16)
    assert found.values == pytest.approx(np.linalg.svd(matrix, compute_uv=False), rel=1e-5)
    assert found.left.shape == (90, 7)
    rebuilt = found.left * found.values @ found.right.T
    assert rebuilt == pytest.approx(matrix, abs=1e-6)


def test_the_shorter_side_decides_whether_a_matrix_is_decomposed_whole():
    noise = np.random.default_rng(5).normal(size=(900, 120)).astype(np.float32)
    for matrix in (noise, np.ascontiguousarray(noise.T)):
        found = leading_spectrum(blocks_of(matrix), matrix.shape, 16)
        # a randomised one errs by per cents on noise
        assert found.values == pytest.approx(np.linalg.svd(matrix, compute_uv=False)[:16], rel=1e-5)


def test_a_matrix_of_noughts_has_values_of_nought_and_no_nan():
    found = leading_spectrum(blocks_of(np.zeros((5, 3), np.float32)), (5, 3), 2)
    assert found.values.tolist() == [0.0, 0.0]
    assert not found.left.any()
    assert np.isfinite(found.right).all()


def test_energy_in_a_subspace_by_hand():
    # U = e0, V = e1: the entry (0, 1), 3, of a squared norm of 1 + 9 + 16
    matrix = np.array([[1, 3], [4, 0]], np.float32)
    left, right = np.array([[1], [0]], np.float32), np.array([[0], [1]], np.float32)
    assert subspace_energy(blocks_of(matrix, 1), left, right) == 9.0


def test_products_by_blocks_are_products():
    rng = np.random.default_rng(3)
    matrix, x, y = (rng.normal(size=s).astype(np.float32) for s in ((100, 60), (60, 4), (100, 4)))
    assert multiply(blocks_of(matrix), x) == pytest.approx(matrix @ x, abs=1e-4)
    assert multiply_transposed(blocks_of(matrix), y) == pytest.approx(matrix.T @ y, abs=1e-4)


def test_noise_has_the_energy_of_chance_in_any_subspace():
    rng = np.random.default_rng(4)
    base, noise = falling(0.5), rng.normal(size=(600, 540)).astype(np.float32)
    found = leading_spectrum(blocks_of(base), base.shape, 32)
    share = subspace_energy(blocks_of(noise), found.left, found.right) / np.square(noise).sum()
    # 1,024 squared normals: a relative deviation of sqrt(2 / 1024) = 4.4 %, four of them
    assert share == pytest.approx(32 * 32 / (600 * 540), rel=0.18)
