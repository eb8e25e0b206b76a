"""Changes to patient folders on disk, for tests of what is wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from biomodel.imaging.nifti import read_image, write_image


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest's data in place."""
    path = folder / "patient.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rewrite(folder: Path, file: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the voxels of an image; its affine stays."""
    image = read_image(folder / file)
    write_image(folder / file, change(image.values.copy()), image.affine)
