"""Builds the selective scan of the mamba_ssm package in CUDA, for the GPU of this machine alone.

    MAMBA_SKIP_CUDA_BUILD=TRUE \
        pip download --no-deps --no-binary :all: --no-build-isolation mamba-ssm==2.3.2.post1
    python results/build_mamba_ssm.py mamba_ssm-2.3.2.post1.tar.gz build
    PYTHONPATH=build python results/scan_speed.py           times it beside ours

It needs nvcc, ninja and einops. The package's own set-up leaves the scan out, or builds it for nine
generations of GPUs. One takes as long as the slowest of ten source files, a minute or two, where
there is a core for each of them.
"""
import os
import shutil
import sys
import tarfile
from pathlib import Path


def unpack(archive, folder):
    """Unpacks the package's source, and copies the Python parts that the scan needs -> the source

    The package's __init__.py is not among them: it imports all of its models.
    """
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = next(folder.glob("mamba_ssm-*"))
    shutil.rmtree(folder / "mamba_ssm", ignore_errors=True)
    for part in ("ops", "utils"):
        shutil.copytree(source / "mamba_ssm" / part, folder / "mamba_ssm" / part)
    return source


def build(source, folder):
    """Compiles the CUDA extension of the scan into the folder."""
    from torch.utils.cpp_extension import load  # here, as it looks for CUDA when it is imported

    files = []
    for file in (source / "csrc" / "selective_scan").iterdir():
        if file.suffix in (".cpp", ".cu"):
            files.append(str(file))
    cuda_flags = [
        "-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"
    ]
    for dtype in ("HALF", "BFLOAT16", "BFLOAT162"):
        for feature in ("OPERATORS", "CONVERSIONS"):
            cuda_flags.append(f"-U__CUDA_NO_{dtype}_{feature}__")
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    load(
        "selective_scan_cuda", files, extra_cflags=["-O3"], extra_cuda_cflags=cuda_flags,
        build_directory=str(folder), verbose=True
    )


def main():
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} ARCHIVE FOLDER")
    archive, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    source = unpack(archive, folder)
    build(source, folder)


if __name__ == "__main__":
    main()
