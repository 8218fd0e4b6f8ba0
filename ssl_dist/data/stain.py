"""Stain augmentation as one affine map in optical density, made from numbers alone.

Light that passes stained tissue falls off exponentially (Beer and Lambert): optical density is linear in the amount of
each stain. To scale and shift the stains is therefore one 3x3 matrix and one offset in density, whatever the kernel.
"""

import numpy as np

# Optical density of haematoxylin, eosin and what neither explains, one row each (Ruifrok & Johnston 2001, normalised;
# the residual is orthogonal to both).
HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)


def stains() -> np.ndarray:
    """The 3x3 matrix whose rows are unit vectors of haematoxylin, eosin and residual."""
    h, e = (np.array(vector) / np.linalg.norm(vector) for vector in (HAEMATOXYLIN, EOSIN))
    residual = np.cross(h, e)
    return np.stack([h, e, residual / np.linalg.norm(residual)])


def affine(scale_N3: np.ndarray, shift_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (N, 3, 3) and offsets (N, 3) that turn an RGB density OD into A OD + t, stains scaled and shifted."""
    rows = stains()
    matrix = np.linalg.inv(rows)[None] @ (scale_N3[:, :, None] * rows[None])     # density as a row: OD S⁻¹ diag(a) S
    return np.ascontiguousarray(matrix.transpose(0, 2, 1)), shift_N3 @ rows
