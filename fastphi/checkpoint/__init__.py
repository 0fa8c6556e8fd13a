"""Models on disk: fastphi's own safetensors (`native`), the authors' folders (`authors`, read without
running anything in them), and the models that come with fastphi, each beside its card (`pretrained`).
"""

from fastphi.checkpoint.native import fingerprint, load, load_authors_checkpoint, save

__all__ = ["fingerprint", "load", "load_authors_checkpoint", "save"]
