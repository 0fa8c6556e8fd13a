"""φ of many images (§2.2): the job and what it promises (`extraction`), one chunk of it (`chunk`), and the
folder it fills, row by row (`store`).
"""

from fastphi.phi.extraction import AUTHORS_SIGMAS, extract
from fastphi.phi.store import PhiStore

__all__ = ["AUTHORS_SIGMAS", "PhiStore", "extract"]
