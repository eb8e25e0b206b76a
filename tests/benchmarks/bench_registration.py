"""Registration of virtual patients who moved in a known way between visits: error, tumour volume, time.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/bench_registration.py [patients] [within]

Images are virtual: fat-suppressed T1-weighted after contrast, made from the tissues of a virtual patient with a seeded
random texture. At the later visit the tumour has changed as the patient's truth says, the patient lies elsewhere
(rigid, up to 10 mm and 5 degrees, and a smooth bending up to 6 mm that takes the tumour with it), and gain, contrast,
enhancement, coil shading and noise are others.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from biomodel.anatomy import random_field
from biomodel.imaging.motion import correct_motion
from biomodel.imaging.registration import Affine, BSpline, Image, Rigid, register, volume_change
from biomodel.imaging.registration_search import check_image
from biomodel.imaging.series import Grid, Kind, Series
from biomodel.imaging.transforms import Transform, to_itk, voxel_centres
from biomodel.virtual import virtual_patient

PATIENTS, VISIBLE = 20, 0.15
#: Repetitions for the spread.
SEEDS = (0, 1, 2)
FINE = 2


@dataclass
class Case:
    """Two visits and what is known of the motion between them."""

    fixed: np.ndarray
    moving: np.ndarray
    grid: Grid
    organ: np.ndarray
    tumour: np.ndarray
    moving_organ: np.ndarray
    moving_tumour: np.ndarray
    true: np.ndarray  # displacement of each fixed point, mm


class Anatomy:
    """What stays of a patient from visit to visit, on voxels half as large."""

    def __init__(self, seed: int) -> None:
        made = virtual_patient(seed)
        domain = made.patient.domain
        self.grid = Grid.of(domain)
        self.cells = made.truth["cell_fraction"].values
        rng = np.random.default_rng([seed, 1])
        self.organ = self._fine(domain.mask) >= 0.5
        self.gland = self._fine(domain.tissues["fibroglandular"]) * self.organ
        behind = ~self.organ & (np.cumsum(self.organ, axis=1) == 0)
        height = np.arange(self.organ.shape[1])[None, :, None] / self.organ.shape[1]
        self.muscle = behind & (self.organ.any(axis=1, keepdims=True) | (height < 0.1))
        step = tuple(s / FINE for s in self.grid.spacing)
        rough = 0.15 * random_field(rng, self.organ.shape, step, 2.0) + 0.1 * random_field(
            rng, self.organ.shape, step, 6.0
        )
        self.texture = np.exp(rough)

    def _fine(self, values: np.ndarray) -> np.ndarray:
        index = np.meshgrid(*[(np.arange(n * FINE) + 0.5) / FINE - 0.5 for n in values.shape], indexing="ij")
        return ndimage.map_coordinates(np.asarray(values, float), index, order=1, mode="nearest")

    def tissue(self, visit: int, enhancement: float) -> np.ndarray:
        """Signal without noise; the tumour takes up more than the gland."""
        tumour = np.clip(self._fine(self.cells[visit]) / 0.5, 0, 1)
        plain = np.where(self.organ, 0.3 + 0.3 * self.gland * enhancement, 0.45 * self.muscle)
        return self.texture * (plain * (1 - tumour) + 1.1 * enhancement * tumour)

    def at(self, fine: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Values at points, mm (..., 3) as x, y, z."""
        index = np.moveaxis(points[..., ::-1] / np.array(self.grid.spacing), -1, 0) * FINE + 0.5 * (FINE - 1)
        return ndimage.map_coordinates(np.asarray(fine, float), index, order=1, mode="nearest")


@dataclass
class Motion:
    """From the later visit's points to the reference's: rigid, then a cubic B-spline."""

    rotation: np.ndarray
    shift: np.ndarray
    middle: np.ndarray
    coefficients: np.ndarray
    knots: float

    @classmethod
    def draw(cls, rng: np.random.Generator, grid: Grid, organ: np.ndarray) -> "Motion":
        points = voxel_centres(grid)
        axis = rng.normal(size=3)
        turn = np.deg2rad(rng.uniform(1, 5)) * axis / np.linalg.norm(axis)
        way = rng.normal(size=3)
        knots = 35.0
        count = np.ceil(np.ptp(points.reshape(-1, 3), axis=0) / knots).astype(int)[::-1] + 5
        made = cls(
            Rotation.from_rotvec(turn).as_matrix(),
            rng.uniform(3, 10) * way / np.linalg.norm(way),
            points[organ].mean(0),
            rng.normal(size=(3, *count)),
            knots,
        )
        size = np.linalg.norm(made.bend(points[organ]), axis=-1).max()
        made.coefficients *= rng.uniform(3, 6) / size
        return made

    def bend(self, points: np.ndarray) -> np.ndarray:
        index = np.moveaxis(points[..., ::-1], -1, 0) / self.knots + 2.0
        return np.stack(
            [ndimage.map_coordinates(c, index, order=3, prefilter=False, mode="nearest") for c in self.coefficients], -1
        )

    def back(self, points: np.ndarray) -> np.ndarray:
        """Where the later visit's points lie in the reference."""
        moved = (points - self.middle) @ self.rotation.T + self.middle + self.shift
        return moved + self.bend(moved)

    def true(self, points: np.ndarray) -> np.ndarray:
        """Displacement of the reference's points to the later visit, by fixed-point iteration."""
        found = points.copy()
        for _ in range(60):
            found = points - self.bend(found)
        return (found - self.middle - self.shift) @ self.rotation + self.middle - points


def acquire(tissue: np.ndarray, rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """Gain, contrast, coil shading and Rician noise of one visit."""
    shade = np.exp(0.15 * random_field(rng, grid.shape, grid.spacing, 40.0))
    clean = 400 * rng.uniform(0.7, 1.4) * shade * np.clip(tissue, 0, None) ** rng.uniform(0.8, 1.25)
    sigma = 0.05 * np.percentile(clean, 90)
    return np.hypot(clean + sigma * rng.normal(size=clean.shape), sigma * rng.normal(size=clean.shape))


def case(seed: int) -> Case:
    anatomy = Anatomy(seed)
    rng = np.random.default_rng([seed, 2])
    grid = anatomy.grid
    points = voxel_centres(grid)
    visit = 1 + seed % 3
    while (anatomy.cells[visit] >= VISIBLE).sum() < 20:
        visit -= 1
    organ = anatomy.at(anatomy.organ, points) >= 0.5
    motion = Motion.draw(rng, grid, organ)
    later = motion.back(points)
    one, two = anatomy.tissue(0, 1.0), anatomy.tissue(visit, rng.uniform(0.7, 1.2))
    return Case(
        acquire(anatomy.at(one, points), rng, grid),
        acquire(anatomy.at(two, later), rng, grid),
        grid,
        organ,
        anatomy.cells[0] >= VISIBLE,
        anatomy.at(anatomy.organ, later) >= 0.5,
        anatomy.at(anatomy._fine(anatomy.cells[visit]), later) >= VISIBLE,
        motion.true(points),
    )


def simpleitk_spline(case: Case, region: np.ndarray, start: np.ndarray) -> Transform:
    """SimpleITK's own B-spline, as its examples set it up: mutual information, L-BFGS-B, no safeguard.

    Knots 40 mm apart, 8000 samples and 30 steps were the best of 20, 30 and 40 mm on patients 0 and 1.
    """
    import SimpleITK as sitk

    fixed, moving = (to_itk(check_image(v, case.grid, None, "image")[0], case.grid) for v in (case.fixed, case.moving))
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(8000 / case.fixed.size, 1)
    method.SetMetricFixedMask(to_itk(region.astype(np.uint8), case.grid))
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1, 0])
    method.SetOptimizerAsLBFGSB(numberOfIterations=30)
    first = Transform(case.grid, start).itk()
    method.SetMovingInitialTransform(first)
    mesh = [max(1, round(n * s / 40)) for n, s in zip(case.grid.shape[::-1], case.grid.spacing[::-1], strict=True)]
    method.SetInitialTransform(sitk.BSplineTransformInitializer(fixed, mesh, 3), inPlace=False)
    found = sitk.CompositeTransform([first, method.Execute(fixed, moving)])
    return Transform.from_itk(found, case.grid, start, linear=False)


def score(case: Case, transform: Transform, took: float) -> list[float]:
    """Median and 95th percentile of the error in the organ, median in the tumour, volumes, least Jacobian, time."""
    error = np.linalg.norm(transform.displacement() - case.true, axis=-1)
    change = volume_change(transform, case.moving_tumour, case.grid)
    mask = transform.apply(case.moving_tumour, case.grid).sum() / case.moving_tumour.sum()
    return [
        np.median(error[case.organ]),
        np.percentile(error[case.organ], 95),
        np.median(error[case.tumour]),
        abs(change.percent),
        100 * abs(mask - 1),
        transform.jacobian().min(),
        took,
    ]


def timed(run):
    began = time.process_time()
    found = run()
    return found, time.process_time() - began


def patients() -> None:
    """All patients: before, by SimpleITK, and ours with and without the safeguard of the tumour."""
    rows: dict[str, list[list[float]]] = {}
    spread, error = [], []
    for seed in range(PATIENTS):
        c = case(seed)
        region = ndimage.binary_dilation(c.organ, iterations=4)
        fixed, moving = Image(c.fixed, c.grid, region), Image(c.moving, c.grid)
        drawn = {"tumour": c.tumour, "moving_tumour": c.moving_tumour, "visit": 2}

        rigid, took = timed(lambda: register(fixed, moving, Rigid(), **drawn))  # noqa: B023
        plain, longer = timed(lambda: simpleitk_spline(c, region, rigid.transform.matrix))  # noqa: B023
        affine, third = timed(lambda: register(fixed, moving, Affine(), **drawn))  # noqa: B023
        free, fourth = timed(lambda: register(fixed, moving, BSpline(), visit=2))  # noqa: B023
        ours, fifth = timed(lambda: register(fixed, moving, BSpline(), **drawn))  # noqa: B023
        again = register(fixed, moving, BSpline(), **drawn, seeds=SEEDS)
        outside = c.organ & ~ndimage.binary_dilation(c.tumour | ours.apply(c.moving_tumour), iterations=8)
        spread.append(np.mean(again.spread[outside] ** 2))
        error.append(np.mean(np.linalg.norm(again.displacement() - c.true, axis=-1)[outside] ** 2))
        for name, transform, seconds in (
            ("none", Transform(c.grid, np.eye(4)), 0.0),
            ("rigid", rigid.transform, took),
            ("affine, guarded", affine.transform, third),
            ("SimpleITK B-spline", plain, took + longer),
            ("ours, no tumour given", free.transform, fourth),
            ("ours", ours.transform, fifth),
        ):
            rows.setdefault(name, []).append(score(c, transform, seconds))
    voxel = min(c.grid.spacing)
    print(f"\n{PATIENTS} virtual patients, two visits each, voxels {c.grid.spacing} mm; one thread, CPU time")
    print(
        "error in the organ (mm): median over patients of each one's median and 95th percentile, and the worst median"
    )
    print(
        f"voxel: that median over the smallest side, {voxel:g} mm. Tumour volume: change by the registration, per cent,"
    )
    print("by partly filled voxels, and of the mask that is drawn")
    print(f"{'registration':24s}{'median':>8s}{'voxel':>8s}{'worst':>8s}{'95 %':>8s}{'tumour':>8s}"
          f"{'vol. med':>10s}{'max':>8s}{'mask max':>10s}{'folded':>8s}{'s':>7s}{'of ours':>9s}")  # fmt: skip
    reference = np.median(np.array(rows["ours"])[:, 6])
    for name, values in rows.items():
        v = np.array(values)
        print(f"{name:24s}{np.median(v[:, 0]):8.2f}{np.median(v[:, 0]) / voxel:8.2f}{v[:, 0].max():8.2f}"
              f"{np.median(v[:, 1]):8.2f}{np.median(v[:, 2]):8.2f}{np.median(v[:, 3]):10.2f}{v[:, 3].max():8.2f}"
              f"{v[:, 4].max():10.2f}{int((v[:, 5] <= 0).sum()):8d}{np.median(v[:, 6]):7.1f}"
              f"{np.median(v[:, 6]) / reference:9.2f}")  # fmt: skip
    print(f"spread over {len(SEEDS)} seeds {np.sqrt(np.mean(spread)):.2f} mm, error {np.sqrt(np.mean(error)):.2f} mm "
          "(root mean square, organ away from the tumour)")  # fmt: skip


def within(count: int = 3, samples: int = 14) -> None:
    """Motion between the samples of a dynamic series while gland and tumour brighten."""
    rows: dict[str, list[tuple[np.ndarray, float]]] = {}
    phase = []
    for seed in range(count):
        anatomy = Anatomy(seed)
        rng = np.random.default_rng([seed, 3])
        grid, points = anatomy.grid, voxel_centres(anatomy.grid)
        organ = anatomy.at(anatomy.organ, points) >= 0.5
        middle = points[organ].mean(0)
        shifts = np.cumsum(rng.normal(0, 0.4, (samples, 3)), axis=0) * (np.arange(samples) > 0)[:, None]
        turns = np.deg2rad(rng.normal(0, 0.5, (samples, 3)) * (np.arange(samples) > 0)[:, None])
        data, true = [], []
        for number in range(samples):
            rise = 0.3 + 0.8 * np.clip((number - 3) / 3, 0, 1)
            turn = Rotation.from_rotvec(turns[number]).as_matrix()
            image = anatomy.at(anatomy.tissue(0, rise), (points - middle - shifts[number]) @ turn + middle)
            data.append(np.hypot(image + rng.normal(0, 0.03, image.shape), rng.normal(0, 0.03, image.shape)))
            true.append((points - middle) @ turn.T + middle + shifts[number] - points)
        series = Series(Kind.DCE, np.array(data), grid, times=8.0 * np.arange(samples), flip_angles=10.0, tr=0.005)
        region = ndimage.binary_dilation(organ, iterations=4)
        first = Image(series.data[0], grid, region)
        pairs, took = timed(lambda: [register(first, Image(v, grid), Rigid()) for v in series.data])  # noqa: B023
        found, longer = timed(lambda: correct_motion(series, region))  # noqa: B023
        phase.append((found.before, found.after))
        for name, moved, seconds in (
            ("none", [np.zeros_like(points)] * samples, 0.0),
            ("each to the first", [pair.displacement() for pair in pairs], took),
            ("ours", [path.displacement() for path in found.transforms], longer),
        ):
            off = [np.linalg.norm(a - b, axis=-1)[organ].mean() for a, b in zip(moved[1:], true[1:], strict=True)]
            rows.setdefault(name, []).append((np.array(off), seconds))
    print(f"\nwithin a series: {count} virtual patients, {samples} samples, rigid motion during uptake; one thread")
    print(f"{'correction':40s}{'error mm':>10s}{'worst':>8s}{'s':>8s}")
    for name, values in rows.items():
        off = np.array([one for one, _ in values])
        print(f"{name:40s}{off.mean():10.3f}{off.max():8.3f}{np.mean([two for _, two in values]):8.1f}")
    one, two = (np.sqrt(np.mean(np.square([pair[part] for pair in phase]))) for part in (0, 1))
    print(f"by phase correlation with the first sample: {one:.2f} mm before, {two:.2f} mm after (root mean square)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or ["patients", "within"]:
        {"patients": patients, "within": within}[part]()
