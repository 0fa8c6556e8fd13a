"""Images in: photographs packed into one array (`packing`, from the `sources` it can read, shard by shard),
and anything that `open_images` takes as images (`images`, `memory`). Knows nothing of networks.
"""

from fastphi.data.images import Images, PackedImages
from fastphi.data.memory import MemoryImages, open_images
from fastphi.data.packing import pack

__all__ = ["Images", "MemoryImages", "PackedImages", "open_images", "pack"]
