"""Targets: objects that yield φ*(σ), what a reconstruction is to match at noise level σ.

target = targets.from_images(model, images, copies=8)     # φ of each image at the same σ
target = targets.from_images(model, images, sigma=0.5)    # at one fixed σ
target = targets.fixed(phi)                               # given
target = targets.from_store(store, [3, 14])               # from a φ store
target = targets.mix(a, b, 0.5).with_channels([1, 5, 9])
"""

from fastphi.targets.kinds import Targets
from fastphi.targets.make import centroid, fixed, from_images, from_store, mix, table

__all__ = ["Targets", "centroid", "fixed", "from_images", "from_store", "mix", "table"]
