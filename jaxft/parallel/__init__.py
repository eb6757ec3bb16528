"""One program on many devices: meshes, and the rules by which arrays are split over them."""

from .mesh import make_mesh

__all__ = ["make_mesh"]
