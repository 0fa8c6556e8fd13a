"""Builds fastphi/_cpu: one shared object of torch operators on the LibTorch stable ABI.

It has no Python in it, so one build serves every Python and every torch from 2.10 on.
"""

import platform
import sys
from glob import glob

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "fastphi: torch must be there when fastphi is built, and the build must see it.\n"
        "Install torch (https://pytorch.org), then: pip install --no-build-isolation ."
    )

X86 = platform.machine().lower() in ("x86_64", "amd64")
# 2.10: the oldest torch whose stable ABI has all that is used here
FLAGS = ["-O3", "-g0", "-fno-math-errno", "-Wall", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Multiplications and additions are fused in the kernels and nowhere else: the bits of noise_normal
# are defined with every operation rounded on its own.
KERNELS = ["-ffp-contract=fast", "-Wno-psabi"]
FLAGS_OF = {
    "csrc/cpu/kernels_plain.cpp": KERNELS,
    "csrc/cpu/kernels_avx2.cpp": KERNELS + ["-mavx2", "-mfma"] * X86,
    "csrc/cpu/kernels_avx512.cpp": KERNELS
    + ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
    * X86,
}
SOURCES = [
    "csrc/ops.cpp",
    "csrc/cpu/avg_pool.cpp",
    "csrc/cpu/combine.cpp",
    "csrc/cpu/conv.cpp",
    "csrc/cpu/fused_layer.cpp",
    "csrc/cpu/image_layout.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/match_steps.cpp",
    "csrc/cpu/noise_normal.cpp",
    "csrc/cpu/noisy_image.cpp",
    "csrc/cpu/pack_weights.cpp",
    "csrc/cpu/spatial_mean.cpp",
    "csrc/cpu/unet_fwd.cpp",
    "csrc/cpu/upsample.cpp",
]


class Build(BuildExtension):
    """torch's build, with flags per file: only some files may use AVX-512."""

    def build_extension(self, ext):
        compile_all = self.compiler.compile
        flags = ext.extra_compile_args["cxx"]

        def compile_in_groups(sources, *args, extra_postargs=None, **kwargs):
            objects = []
            plain = [s for s in sources if s not in FLAGS_OF]
            for group in [plain, *([s] for s in sources if s in FLAGS_OF)]:
                extra = FLAGS_OF.get(group[0], ["-ffp-contract=off"])
                postargs = {"cxx": flags + extra}
                objects += compile_all(group, *args, extra_postargs=postargs, **kwargs)
            return objects

        self.compiler.compile = compile_in_groups
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all


flags = " ".join(FLAGS)
setup(
    ext_modules=[
        CppExtension(
            "fastphi._cpu",
            SOURCES + list(FLAGS_OF),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            extra_compile_args={"cxx": FLAGS + [f'-DFASTPHI_BUILD_FLAGS="{flags}"']},
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
