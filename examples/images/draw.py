"""Draw the picture of the README from the results of the main job.

Run: make forecast && .venv/bin/python examples/images/draw.py
"""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imsave

from biomodel.figure_maps import maps
from biomodel.figures import time_course
from biomodel.results import Results

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "examples" / "images" / "forecast.png"
DPI = 125


def pixels(figure):
    """Red, green and blue (height, width, 3) of a figure."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def main():
    results = Results.read(ROOT / "build" / "example" / "forecast")
    # The report's own figures, one above the other; both have the width of its page.
    parts = [pixels(figure) for figure in (time_course(results), maps(results)[0][0])]
    imsave(OUT, np.vstack(parts))
    print(OUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
