"""What geometry makes: the organ's smooth boundary (`OrganMesh`) beside the voxels' steps (`BoxMesh`, `TorchSolver`).

Virtual patients (24 × 24 × 24 voxels of 2 mm) at their true parameters and initial maps, the same tumour moved to the
organ's surface, where the boundary matters most, and that one untreated, so that it spreads along the surface.
Differences are set beside the noise that a scan of that state has.

Run: ``.venv/bin/python tests/benchmarks/bench_geometry.py [number of patients, 3 by default]``.
Needs FEniCS (`tumorcast doctor`) and the extra ``mesh``.
"""

import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
from scipy import ndimage

import biomodel as bm
from biomodel.fenics.mesh import BoxMesh
from biomodel.fenics.organ_mesh import OrganMesh
from biomodel.observation import shift_response
from biomodel.virtual import small_patient

CELL = 1.0  # mm: half a voxel, so that what is left between two meshes is the geometry


def to_the_surface(u, mask):
    """The map moved along x towards the organ's surface, until a tenth of its cells would lie outside."""
    best = u
    for step in range(1, u.shape[2]):
        moved = np.zeros_like(u)
        moved[:, :, step:] = u[:, :, :-step]
        if moved[mask].sum() < 0.9 * u.sum():
            break
        best = moved * mask
    return best


def noise(u, settings):
    """Standard deviations of a scan: of one voxel's cell fraction inside the region, and of all its cells together."""
    region = u >= settings.visible_fraction
    adc = settings.adc_w - (settings.adc_w - settings.adc_min) * u[region]
    response = shift_response(adc, settings)
    voxel = settings.voxel_cv * np.abs(response)
    cells = np.hypot(settings.repeatability_cv * response.sum(), np.linalg.norm(voxel))
    return float(np.sqrt((voxel**2).mean())), float(abs(cells) / u[region].sum())


def main(count):
    """Print the table."""
    print("differences in the cell fraction (root mean square over the region), in cells and in the region's volume;")
    print("'voxels': FEniCS on the voxels less TorchSolver; 'geometry': FEniCS on the organ less FEniCS on the voxels,")
    print(f"both with cells of {CELL:g} mm; 'noise': standard deviation of a scan in a voxel, and in all cells\n")
    head = f"{'tumour':>22} {'day':>4} {'cm³':>6} | {'voxels: map':>11} {'cells':>8} | {'geometry: map':>13} "
    print(head + f"{'cells':>8} {'volume':>8} | {'noise: map':>10} {'cells':>7}")
    ratios = []
    for seed in range(1, count + 1):
        virtual = small_patient(seed)
        patient, domain = virtual.patient, virtual.patient.domain
        treated = bm.ReactionDiffusion(
            bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy(agent) for agent in patient.schedule.agents]
        )
        untreated = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic())
        days = [visit.day for visit in patient.visits[1:]]
        start = np.where(domain.mask, virtual.truth["cell_fraction"].values[0].astype(float), 0.0)
        moved = to_the_surface(start, domain.mask)
        for place, u0, model, schedule in (
            ("as drawn", start, treated, patient.schedule),
            ("at the surface", moved, treated, patient.schedule),
            ("untreated", moved, untreated, bm.Schedule()),
        ):
            params = {name: virtual.parameters[name] for name in model.parameters if name in virtual.parameters}
            near = ndimage.binary_dilation(u0 > 0.01, iterations=2) & domain.mask
            began = time.perf_counter()
            organ = OrganMesh.around(domain, near, fine=CELL, coarse=4.0)
            runs = {}
            for name, solver in (("torch", bm.TorchSolver()), ("box", bm.FenicsSolver(mesh=BoxMesh(2))),
                                 ("organ", bm.FenicsSolver(mesh=organ))):  # fmt: skip
                simulation = solver.build(model, domain, schedule)
                runs[name] = simulation(params, u0, days)[0].numpy()
            seconds = time.perf_counter() - began
            for k, day in enumerate(days):
                torch_, box, smooth = (runs[name][k] for name in ("torch", "box", "organ"))
                region = box >= patient.cellularity.visible_fraction
                if region.sum() < 10:
                    print(f"{f'{seed}, {place}':>22} {day:4.0f}   gone")
                    continue
                cm3 = domain.voxel_volume / 1e3
                volume = (smooth >= patient.cellularity.visible_fraction).sum() * cm3 - region.sum() * cm3

                def rms(a, b, where=region):
                    return float(np.sqrt(((a - b)[where] ** 2).mean()))

                voxel_sd, cells_sd = noise(box, patient.cellularity)
                ratios.append((place, rms(smooth, box) / voxel_sd, abs(smooth.sum() / box.sum() - 1) / cells_sd))
                print(f"{f'{seed}, {place}':>22} {day:4.0f} {region.sum() * cm3:6.2f} | {rms(box, torch_):11.5f} "
                      f"{100 * (box.sum() / torch_.sum() - 1):7.2f}% | {rms(smooth, box):13.5f} "
                      f"{100 * (smooth.sum() / box.sum() - 1):7.2f}% {volume:+8.3f} | {voxel_sd:10.5f} "
                      f"{100 * cells_sd:6.2f}%")  # fmt: skip
            print(f"{'':>10} {seconds:.1f} s for the three; {simulation.mesh.quality}", flush=True)
    print("\ngeometry over noise, median and largest:")
    for place in ("as drawn", "at the surface", "untreated"):
        found = np.array([r[1:] for r in ratios if r[0] == place])
        print(f"  {place:>15}: map {np.median(found[:, 0]):.2f}, {found[:, 0].max():.2f}; cells "
              f"{np.median(found[:, 1]):.2f}, {found[:, 1].max():.2f}")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
