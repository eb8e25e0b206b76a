"""Organ-conforming meshes: geometry, grading, quality, and what is said of masks and programs that do not work."""

import sys

import numpy as np
import pytest

from biomodel.domain import Domain
from biomodel.errors import GeometryError, SolverError
from biomodel.fenics.mesh_quality import cell_angles, radius_ratios
from biomodel.fenics.organ_mesh import OrganMesh, boundary_facets
from biomodel.fenics.surface import enclosed, mask_boundary, mask_holes


def grid(shape, spacing):
    return np.meshgrid(*((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")


def ball(n=20, radius=8.3, spacing=(1.0, 1.0, 1.0), hole=0.0):
    shape = tuple(int(round(n / s)) for s in spacing)
    z, y, x = grid(shape, spacing)
    r = np.sqrt(x**2 + y**2 + z**2)
    return Domain.box(shape, spacing, (r < radius) & (r >= hole))


def disc(n=30, radius=12.4, hole=0.0):
    _, y, x = grid((1, n, n), (1, 1, 1))
    r = np.sqrt(x**2 + y**2)
    return Domain.box((1, n, n), (1, 1, 1), (r < radius) & (r >= hole))


def mask_volume(domain):
    return domain.mask.sum() * np.prod([s for s, n in zip(domain.spacing, domain.shape, strict=True) if n > 1])


def distances(mesh):
    """Distance of the boundary's vertices from the middle of the box."""
    on = np.unique(boundary_facets(mesh.cells)[:, :-1])
    domain = mesh.domain
    middle = [np.mean(domain.coords["xyz"[a]][[0, -1]]) for a in mesh.axes]
    return np.linalg.norm(mesh.points[on] - middle, axis=1)


def dumbbell(width):
    z, y, x = np.ogrid[:20, :20, :40]
    mask = (z - 10) ** 2 + (y - 10) ** 2 + (x - 10) ** 2 < 49
    mask = mask | ((z - 10) ** 2 + (y - 10) ** 2 + (x - 30) ** 2 < 49)
    bar = slice(10 - width // 2, 11 + (width - 1) // 2)
    mask[bar, bar, 10:30] = True
    return Domain.box(mask.shape, mask=mask)


# Geometry -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "maker"),
    [(ball(), OrganMesh(fine=2.5)), (ball(spacing=(2.0, 1.0, 1.25)), OrganMesh(fine=2.0)), (disc(), OrganMesh()),
     (disc(), OrganMesh(fine=5.0))],
    ids=["ball", "ball of oblong voxels", "disc", "coarse disc"],
)  # fmt: skip
def test_has_the_masks_volume_and_not_its_steps(domain, maker):
    mesh = maker.make(domain)
    dim = len(mesh.axes)
    volume = mask_volume(domain)
    assert mesh.volumes.sum() == pytest.approx(volume, rel=1e-12)
    # The ball of the same volume: voxels' corners lie up to half a diagonal off.
    radius = (volume / np.pi) ** 0.5 if dim == 2 else (volume * 3 / 4 / np.pi) ** (1 / 3)
    used = [s for s, n in zip(domain.spacing, domain.shape, strict=True) if n > 1]
    assert np.abs(distances(mesh) - radius).max() < 0.3 * np.linalg.norm(used)
    quality = mesh.quality
    assert quality.volume == pytest.approx(quality.mask_volume, rel=1e-12)
    assert quality.radius_ratio[0] > (0.2 if dim == 3 else 0.5) and quality.angle[0] > 10
    assert 0.001 < quality.outside < 0.1
    assert set(np.unique(mesh.cells)) == set(range(len(mesh.points)))


def test_cells_are_small_at_the_tumour_alone():
    domain = ball(n=32, radius=14.0)
    region = np.zeros(domain.shape, bool)
    region[14:18, 14:18, 22:26] = True
    mesh = OrganMesh.around(domain, region, fine=1.5, coarse=6.0, margin=3.0).make(domain)
    ends = mesh.points[mesh.edges]
    length = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)
    away = np.linalg.norm(ends.mean(1) - [23.5, 15.5, 15.5], axis=1)
    assert np.median(length[away < 4]) == pytest.approx(1.5, rel=0.2)
    assert 4.5 < np.median(length[away > 20]) < 7.5
    everywhere = OrganMesh(fine=1.5).make(domain)
    assert 5 * len(mesh.cells) < len(everywhere.cells)


def test_the_region_may_lie_on_another_grid():
    """A crop of the domain gets the same sizes at the same places in the patient."""
    domain = disc()
    region = np.zeros(domain.shape, bool)
    region[0, 12:16, 18:22] = True
    maker = OrganMesh.around(domain, region, fine=0.8, coarse=4.0, margin=0.0)
    box = (slice(0, 1), slice(2, 28), slice(2, 28))
    whole, part = maker.make(domain), maker.make(domain.crop(box))
    assert part.volumes.sum() == pytest.approx(whole.volumes.sum(), rel=1e-12)
    assert len(part.cells) == pytest.approx(len(whole.cells), rel=0.1)
    assert np.abs(part.points.min(0) - whole.points.min(0)).max() < 0.1


@pytest.mark.parametrize("domain", [ball(hole=3.4), disc(hole=4.2)], ids=["shell", "ring"])
def test_holes_stay(domain):
    mesh = OrganMesh(fine=2.0).make(domain)
    assert (mesh.quality.holes, mesh.quality.mask_holes) == (1, 1)
    assert mesh.volumes.sum() == pytest.approx(mask_volume(domain), rel=1e-12)
    inner = distances(mesh)
    inner = inner[inner < 7]
    assert inner.mean() == pytest.approx(3.4 if len(mesh.axes) == 3 else 4.2, abs=0.25)


def test_a_hole_of_one_voxel_is_filled_and_counted():
    domain = disc()
    mask = domain.mask.copy()
    mask[0, 14, 14] = False
    quality = OrganMesh(fine=2.0).make(Domain.box(mask.shape, mask=mask)).quality
    assert (quality.holes, quality.mask_holes) == (0, 1)


def test_boundary_encloses_the_masks_volume():
    domain = ball(hole=3.4)
    boundary = mask_boundary(domain, (0, 1, 2), 1.0)
    assert boundary.holes == 1
    assert enclosed(boundary.points, boundary.facets) == pytest.approx(mask_volume(domain), rel=1e-6)
    assert enclosed(boundary.points, boundary.facets[boundary.part == 1]) < 0  # a hole's normals point into it


def test_the_same_mesh_every_time():
    domain = disc()
    one, two = (OrganMesh(fine=2.0).make(domain) for _ in range(2))
    assert np.array_equal(one.points, two.points) and np.array_equal(one.cells, two.cells)


def test_shapes_of_cells():
    triangle = np.array([[[0, 0], [1, 0], [0.5, 3**0.5 / 2]]])
    tetrahedron = np.array([[[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]], float)
    assert radius_ratios(triangle) == pytest.approx([1.0])
    assert radius_ratios(tetrahedron) == pytest.approx([1.0])
    assert cell_angles(triangle) == pytest.approx(np.full((1, 3), 60.0))
    assert cell_angles(tetrahedron) == pytest.approx(np.full((1, 6), np.degrees(np.arccos(1 / 3))))
    corner = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]], float)
    assert sorted(cell_angles(corner)[0]) == pytest.approx([54.7356103] * 3 + [90.0] * 3)
    assert radius_ratios(corner) == pytest.approx([3 * (1 / (3 + 3**0.5)) / (3**0.5 / 2)])
    flat = np.array([[[0, 0], [1, 0], [0.5, 1e-3]]])
    assert radius_ratios(flat)[0] < 1e-2


# Settings -------------------------------------------------------------------------------------------------------------


def test_sizes_follow_the_voxels():
    domain = ball(spacing=(2.0, 1.0, 4.0))
    assert OrganMesh().sizes(domain) == pytest.approx((2.0, 8.0))
    assert OrganMesh(fine=3.0, coarse=5.0).finer() == OrganMesh(fine=1.5, coarse=2.5)
    with pytest.raises(SolverError, match="name the size"):
        OrganMesh().finer()


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"fine": 0.0}, "fine is 0"), ({"grading": 2.0}, "grading"), ({"smooth": 0.0}, "smooth"),
     ({"margin": -1.0}, "margin"), ({"fine": 4.0, "coarse": 2.0}, "exchange")],
)  # fmt: skip
def test_settings_without_meaning(settings, word):
    with pytest.raises(SolverError, match=word):
        OrganMesh(**settings)


def test_regions_that_do_not_fit():
    with pytest.raises(GeometryError, match="shape"):
        OrganMesh.around(disc(), np.ones((1, 3, 3), bool))
    with pytest.raises(GeometryError, match="empty"):
        OrganMesh.around(disc(), np.zeros((1, 30, 30), bool))
    elsewhere = Domain(np.ones((1, 5, 5), bool), (1.0, 1.0, 1.0), [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 40],
                                                                  [0, 0, 0, 1]])  # fmt: skip
    with pytest.raises(GeometryError, match="does not meet"):
        OrganMesh(elsewhere).make(disc())


# Masks of which no mesh can be made -----------------------------------------------------------------------------------


def test_several_components():
    mask = ball(n=24, radius=5.0).mask.copy()
    mask[1:3, 1:3, 1:3] = True
    with pytest.raises(GeometryError, match=r"2 components .* of \d+, 8 voxels.*Keep the component"):
        OrganMesh().make(Domain.box(mask.shape, mask=mask))


@pytest.mark.parametrize("dim", [2, 3])
def test_a_hole_that_touches_the_border(dim):
    mask = np.ones((8,) * dim, bool)
    mask[(1,) * dim] = mask[(0,) * dim] = False
    assert mask[(0,) * (dim - 1) + (1,)]
    domain = Domain.box((1,) * (3 - dim) + mask.shape, mask=mask.reshape((1,) * (3 - dim) + mask.shape))
    with pytest.raises(GeometryError, match=r"hole of 1 voxels .* the mask's border .* voxel \(1, 1.*Fill the hole"):
        OrganMesh().make(domain)


def test_holes_that_touch_each_other():
    mask = np.ones((9, 9), bool)
    mask[3, 3] = mask[4, 4] = False
    with pytest.raises(GeometryError, match="another hole"):
        mask_holes(mask)
    mask[4, 3] = False  # joined through faces: one hole
    (hole,) = mask_holes(mask)
    assert len(hole) == 3


def test_a_dent_in_the_border_is_no_hole():
    mask = np.ones((8, 8, 8), bool)
    mask[:3, 3:6, 3:6] = False
    domain = Domain.box(mask.shape, mask=mask)
    mesh = OrganMesh(fine=2.0).make(domain)
    assert mesh.holes == 0 and mesh.volumes.sum() == pytest.approx(mask.sum(), rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 9, 9), (1, 2, 9)])
def test_too_small(shape):
    with pytest.raises(GeometryError, match=r"voxels wide along axis 0 .* at least 4"):
        OrganMesh().make(Domain.box(shape))


def test_a_line_has_no_organ():
    with pytest.raises(GeometryError, match="BoxMesh"):
        OrganMesh().make(Domain.box((1, 1, 9)))


def test_a_part_that_smoothing_cuts_off():
    with pytest.raises(GeometryError, match=r"cuts off a part .* around x \d+\.\d, y 10.0, z 10.0 mm.*Smooth less"):
        OrganMesh().make(dumbbell(1))


def test_cells_too_large_for_the_shape():
    """A ring, cut open, that cells of its radius cannot follow: no mesh rather than another organ."""
    z, y, x = grid((24, 24, 24), (1, 1, 1))
    ring = (np.abs(np.hypot(x, y) - 8) < 2.2) & (np.abs(z) < 2.2) & ~((x > 0) & (np.abs(y) < 1.2))
    domain = Domain.box(ring.shape, mask=ring)
    with pytest.raises(SolverError, match=r"too large for the organ's shape.* \d\d % .*around x .*smaller cells"):
        OrganMesh(fine=5.0).make(domain)
    assert OrganMesh(fine=1.5).make(domain).quality.moved < 0.3


# Programs that do not work --------------------------------------------------------------------------------------------


def test_gmsh_fails_and_the_region_is_named():
    """Cells far wider than a neck: the surfaces of its two sides cross each other."""
    with pytest.raises(SolverError, match=r"could not fill the organ around x 20\.\d, y \d+.*smaller cells"):
        OrganMesh(fine=6.0, coarse=6.0, smooth=0.5).make(dumbbell(3))


@pytest.mark.parametrize(
    ("source", "words"),
    [("raise OSError('libGLU.so.1: cannot open shared object file: No such file or directory')",
      "apt-get install libglu1-mesa"),
     ("raise OSError('libodd.so.3: cannot open shared object file')", "system package that holds libodd"),
     ("raise ImportError('No module named gmsh')", r"tumorcast\[mesh\]"),
     ("import os\ndef initialize(*a, **k):\n    os.kill(os.getpid(), 11)", "ended with status -11")],
    ids=["libGLU", "another library", "not installed", "crash"],
)  # fmt: skip
def test_gmsh_does_not_work(source, words, tmp_path, monkeypatch):
    (tmp_path / "gmsh.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SolverError, match=words):
        OrganMesh().make(disc())


def test_gmsh_does_not_end(tmp_path, monkeypatch):
    (tmp_path / "gmsh.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("biomodel.fenics.organ_mesh.PATIENCE", 0.5)
    with pytest.raises(SolverError, match="did not end"):
        OrganMesh().make(disc())


def test_scikit_image_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(SolverError, match=r"scikit-image.*tumorcast\[mesh\]"):
        OrganMesh().make(disc())
