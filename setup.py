"""Builds fastphi/_cpu, and fastphi/_cuda where a CUDA toolkit and a torch with CUDA are found.

Shared objects of torch operators on the LibTorch stable ABI, with no Python in them: one build serves
every Python and every torch from 2.10 on. With CUDA and pybind11 also fastphi/_graph, which knows no
torch, but is made for one Python; where that fails the build goes on without it and says so. Whether
there is a GPU does not matter. Environment:
    FASTPHI_CUDA=auto|0|1           1: without a toolkit the build fails, saying why
    FASTPHI_SANITIZE=WHICH          the CPU engine with these sanitizers: "address,undefined" (make
                                    sanitize) or "thread" (make race)
    CUDA_HOME                       the toolkit, where it is not the one of nvcc on the PATH
    TORCH_CUDA_ARCH_LIST, MAX_JOBS  torch's own
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import CompileError


def toolkit():
    """The folder of the CUDA toolkit, or None."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return os.environ[name]
    nvcc = shutil.which("nvcc")  # may be a link, or a script that calls the one in the toolkit
    homes = [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in (*homes, Path("/usr/local/cuda")):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return str(home)
    return None


CUDA_HOME = toolkit()
if CUDA_HOME:
    os.environ["CUDA_HOME"] = CUDA_HOME  # before torch looks for it, and for where it is a script
# One GPU for each generation with its own machine code; PTX of the last for what comes after.
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "fastphi: torch must be there when fastphi is built, and the build must see it.\n"
        "Install torch (https://pytorch.org), then: pip install --no-build-isolation ."
    )

X86 = platform.machine().lower() in ("x86_64", "amd64")
# 2.10: the oldest torch whose stable ABI has all that is used here
FLAGS = ["-O3", "-g0", "-fno-math-errno", "-Wall", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
SANITIZE: list[str] = []
if wanted := os.environ.get("FASTPHI_SANITIZE"):
    SANITIZE = [f"-fsanitize={wanted}", "-fno-sanitize-recover=all"]
    FLAGS += [*SANITIZE, "-O1", "-g", "-fno-omit-frame-pointer"]
# Multiplications and additions are fused in the kernels and nowhere else: the bits of noise_normal
# are defined with every operation rounded on its own.
KERNELS = ["-ffp-contract=fast", "-Wno-psabi"]
AVX512 = [
    "-mavx512f",
    "-mavx512dq",
    "-mavx512bw",
    "-mavx512vl",
    "-mfma",
    "-mprefer-vector-width=512",
]
# gcc 12 takes the undefined operand of its own intrinsics for a mistake
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-Wno-maybe-uninitialized"]
FLAGS_OF = {
    "csrc/cpu/bf16/amx.cpp": KERNELS + AMX * X86,
    "csrc/cpu/isa/plain.cpp": KERNELS,
    "csrc/cpu/isa/avx2.cpp": KERNELS + ["-mavx2", "-mfma"] * X86,
    "csrc/cpu/isa/avx512.cpp": KERNELS + AVX512 * X86,
}
SOURCES = [
    "csrc/ops.cpp",
    "csrc/cpu/avg_pool.cpp",
    "csrc/cpu/combine.cpp",
    "csrc/cpu/fused_layer.cpp",
    "csrc/cpu/image_layout.cpp",
    "csrc/cpu/inspect.cpp",
    "csrc/cpu/interrupt.cpp",
    "csrc/cpu/match_steps.cpp",
    "csrc/cpu/match_update.cpp",
    "csrc/cpu/noise_normal.cpp",
    "csrc/cpu/noisy_image.cpp",
    "csrc/cpu/pack_weights.cpp",
    "csrc/cpu/spatial_mean.cpp",
    "csrc/cpu/unet_fwd.cpp",
    "csrc/cpu/unet_train.cpp",
    "csrc/cpu/upsample.cpp",
    "csrc/cpu/bf16/launch.cpp",
    "csrc/cpu/bf16/match.cpp",
    "csrc/cpu/bf16/unet.cpp",
    "csrc/cpu/direct/conv.cpp",
    "csrc/cpu/isa/choice.cpp",
    "csrc/cpu/winograd/conv.cpp",
    "csrc/cpu/winograd/backward.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/operators.cpp",
    "csrc/cuda/combine.cu",
    "csrc/cuda/content.cu",
    "csrc/cuda/image_layout.cu",
    "csrc/cuda/match.cu",
    "csrc/cuda/noise_normal.cu",
    "csrc/cuda/noisy_image.cu",
    "csrc/cuda/spatial_mean.cu",
]
GRAPH_SOURCES = ["csrc/graph/module.cpp", "csrc/graph/while_graph.cu"]
# -fmad=false: as -ffp-contract=off, for the same bits as the CPU. It costs little: no kernel here is
# a matrix product.
NVCC_FLAGS = ["-O3", "-fmad=false"]


def why_no_cuda():
    """Why the CUDA kernels are not built, or None."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if CUDA_HOME is None:
        return "no CUDA toolkit was found: put nvcc on the PATH or set CUDA_HOME"
    nvcc = Path(CUDA_HOME, "bin/nvcc")
    if not nvcc.exists():
        return f"CUDA_HOME={CUDA_HOME} has no bin/nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if not found:
        return f"{nvcc} --version does not say which release it is"
    if found[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {found[1]}.{found[2]}, torch was built with {torch.version.cuda}"
    return None


def with_cuda():
    wanted = os.environ.get("FASTPHI_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"fastphi: FASTPHI_CUDA: expected auto, 0 or 1, got {wanted!r}")
    reason = "FASTPHI_CUDA=0" if wanted == "0" else why_no_cuda()
    if reason and wanted == "1":
        sys.exit(f"fastphi: FASTPHI_CUDA=1, but {reason}")
    print(f"fastphi: without the CUDA kernels ({reason})" if reason else "fastphi: with CUDA")
    return reason is None


class Build(BuildExtension):
    """torch's build, with flags per file (only some may use AVX-512), the slow files beside the rest."""

    def finalize_options(self):
        super().finalize_options()
        if self.editable_mode:  # an interrupted or repeated build finds what was compiled
            self.build_temp = "build/editable"

    def build_extension(self, ext):
        if ext.optional:
            try:
                return super().build_extension(ext)
            except (
                Exception
            ) as error:  # ninja's failure is a RuntimeError, which setuptools lets pass
                print(f"fastphi: without {ext.name}: {error}; matches are repeated by the host",
                      flush=True)  # fmt: skip
                raise CompileError(str(error)) from None
        if ext.name != "fastphi._cpu":
            return super().build_extension(ext)
        compile_all = self.compiler.compile
        flags = ext.extra_compile_args["cxx"]

        def compile_in_groups(sources, output_dir=None, extra_postargs=None, **kwargs):
            rest = [s for s in sources if s not in FLAGS_OF]
            groups = {Path(s).stem: [s] for s in FLAGS_OF} | {"": rest}

            def compile_group(name):
                extra = FLAGS_OF.get(groups[name][0], ["-ffp-contract=off"])
                # a folder each: it is where ninja keeps what it knows
                folder = str(Path(output_dir, name))
                postargs = {"cxx": flags + extra}
                return compile_all(groups[name], folder, extra_postargs=postargs, **kwargs)

            # without ninja torch's compile is not made for several threads
            most = int(os.environ.get("MAX_JOBS") or len(groups)) if self.use_ninja else 1
            at_once = max(1, min(most, len(groups)))
            print(f"fastphi: compiling {', '.join(filter(None, groups))} and {len(rest)} other files, "
                  f"{at_once} of these {len(groups)} at once", flush=True)  # fmt: skip
            with ThreadPoolExecutor(at_once) as pool:
                return sum(pool.map(compile_group, groups), [])

        self.compiler.compile = compile_in_groups
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all


def build_flags(flags):
    return f'-DFASTPHI_BUILD_FLAGS="{" ".join(flags)}"'


headers = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
extensions = [
    CppExtension(
        "fastphi._cpu",
        SOURCES + list(FLAGS_OF),
        depends=headers,
        extra_compile_args={"cxx": FLAGS + [build_flags(FLAGS)]},
        extra_link_args=SANITIZE,
        py_limited_api=True,
    )
]
if with_cuda():
    said = build_flags([*NVCC_FLAGS, os.environ["TORCH_CUDA_ARCH_LIST"]])
    extensions.append(
        CUDAExtension(
            "fastphi._cuda",
            CUDA_SOURCES,
            depends=headers,
            # USE_CUDA: torch's headers show the streams only then
            extra_compile_args={"cxx": [*FLAGS, "-DUSE_CUDA", said], "nvcc": NVCC_FLAGS},
            py_limited_api=True,
        )
    )
    if importlib.util.find_spec("pybind11"):
        import pybind11

        extensions.append(
            Extension(
                "fastphi._graph",
                GRAPH_SOURCES,
                depends=headers,
                include_dirs=[pybind11.get_include(), str(Path(CUDA_HOME, "include"))],
                library_dirs=[str(Path(CUDA_HOME, "lib64"))],
                libraries=["cudart"],
                extra_compile_args={"cxx": ["-O3", "-g0", "-Wall"], "nvcc": ["-O3"]},
                language="c++",
                optional=True,
            )
        )
any_python = extensions[-1].name != "fastphi._graph"
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if any_python else {},
)
