"""Finite elements: the FEniCS solver, its worker processes and their meshes."""
