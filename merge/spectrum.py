"""Spectra of matrices that come a block of rows at a time: the leading singular values and vectors.

    Halko, Martinsson and Tropp, "Finding structure with randomness", arXiv 0909.4061, algorithms
    4.4 (randomised subspace iteration) and 5.1 (SVD of the small matrix that is left)

so that a matrix is read 2 * (iterations + 1) times and never held; one with a short side is
decomposed whole.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

Blocks = Callable[[], Iterable[np.ndarray]]
"""Gives the rows of a matrix in order, fp32 [rows, columns] at a time, each time it is called."""

EXACT = 512
"""A matrix with no more rows or columns than this is decomposed whole."""
OVERSAMPLE = 16
"""Directions beyond the wanted ones, which the last wanted ones need."""
ITERATIONS = 4
"""Of the subspace iteration: each one sharpens the spectrum by a power of two."""


@dataclass
class Spectrum:
    """The leading part of a singular value decomposition."""

    values: np.ndarray
    """fp64 [rank], largest first."""
    left: np.ndarray
    """fp32 [rows, rank], orthonormal columns."""
    right: np.ndarray
    """fp32 [columns, rank], orthonormal columns."""


def leading_spectrum(
    blocks: Blocks, shape: tuple[int, int], rank: int, *, exact: int = EXACT, seed: int = 0
) -> Spectrum:
    """Finds the leading singular values and vectors of a matrix.

    Args:
        blocks: Gives the matrix.
        shape: (rows, columns).
        rank: How many, cut to the matrix' own smaller side.
        exact: Smaller side up to which the whole decomposition is made.
        seed: Of the random directions; equal seeds give equal results.

    Returns:
        The spectrum. A randomised one errs on the singular values by less than 0.1 % where they
        fall as i^-1/2 or faster, by up to 3 % on noise (tests/merge/test_spectrum.py).
    """
    rank = min(rank, *shape)
    if min(shape) <= exact:
        return _decompose(np.concatenate(list(blocks())), rank)
    n_directions = min(rank + OVERSAMPLE, *shape)
    start = np.random.default_rng(seed).standard_normal((shape[1], n_directions), np.float32)
    basis = _orthonormal(multiply(blocks, start))
    for _ in range(ITERATIONS):
        basis = _orthonormal(multiply(blocks, _orthonormal(multiply_transposed(blocks, basis))))
    # with Q an orthonormal basis of the range, A is about Q (Q^T A)
    small = _decompose(np.ascontiguousarray(multiply_transposed(blocks, basis).T), rank)
    return Spectrum(small.values, basis @ small.left, small.right)


def _decompose(matrix: np.ndarray, rank: int) -> Spectrum:
    """The decomposition of a matrix with a short side, by the eigenvectors of its fp64 Gram matrix.

    Singular values below 1e-7 of the largest drown in rounding, which the leading ones are not.
    """
    is_wide = matrix.shape[0] <= matrix.shape[1]
    long = (matrix.T if is_wide else matrix).astype(np.float64)
    squares, vectors = np.linalg.eigh(long.T @ long)
    values = np.sqrt(np.maximum(squares[::-1][:rank], 0.0))
    short = vectors[:, ::-1][:, :rank]
    other = (long @ short) / np.where(values > 0, values, 1.0)
    left, right = (short, other) if is_wide else (other, short)
    return Spectrum(values, left.astype(np.float32), right.astype(np.float32))


def multiply(blocks: Blocks, matrix: np.ndarray) -> np.ndarray:
    """A X, fp32 [rows, r], for X fp32 [columns, r]."""
    return np.concatenate([block @ matrix for block in blocks()])


def multiply_transposed(blocks: Blocks, matrix: np.ndarray) -> np.ndarray:
    """A^T Y, fp32 [columns, r], for Y fp32 [rows, r]."""
    total: np.ndarray | None = None
    begin = 0
    for block in blocks():
        part = block.T @ matrix[begin : begin + len(block)]
        total = part if total is None else total + part
        begin += len(block)
    assert total is not None
    return total


def subspace_energy(blocks: Blocks, left: np.ndarray, right: np.ndarray) -> float:
    """||U^T A V||_F^2: how much of a matrix lies between two subspaces.

    With U, V the top-k singular vectors of the base's weight and A an update, this is the part that
    rotates or scales the base's principal directions among themselves. An update without any
    preference has k^2 / (rows * columns) of its squared norm there.

    Args:
        blocks: Gives A.
        left: U, fp32 [rows, k].
        right: V, fp32 [columns, k].
    """
    return float(np.square(left.T @ multiply(blocks, right), dtype=np.float64).sum())


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.qr(matrix)[0]
