"""Builds the CUDA selective scan of the mamba_ssm package for the GPU of this machine alone, to be timed beside ours.

    MAMBA_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-binary :all: --no-build-isolation mamba-ssm==2.3.2.post1
    python results/build_mamba_ssm.py mamba_ssm-2.3.2.post1.tar.gz build
    PYTHONPATH=build python results/speed.py --only gpu

Needs nvcc, ninja and einops. The package's own set-up leaves the scan out, or builds it for nine generations of GPUs; one
takes as long as its slowest source file, a minute or two, where there is a core for each of the ten.
"""
import os
import shutil
import sys
import tarfile
from pathlib import Path

from torch.utils.cpp_extension import load

if __name__ == "__main__":
    archive, build = Path(sys.argv[1]), Path(sys.argv[2])
    build.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(build, filter="data")
    source = next(build.glob("mamba_ssm-*"))
    shutil.rmtree(build / "mamba_ssm", ignore_errors=True)
    for part in ("ops", "utils"):                                    # without __init__.py, which imports all of its models
        shutil.copytree(source / "mamba_ssm" / part, build / "mamba_ssm" / part)
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    half = [f"-U__CUDA_NO_{dtype}_{what}__" for dtype in ("HALF", "BFLOAT16", "BFLOAT162")
            for what in ("OPERATORS", "CONVERSIONS")]
    sources = [str(file) for file in source.glob("csrc/selective_scan/*") if file.suffix in (".cpp", ".cu")]
    load("selective_scan_cuda", sources, extra_cflags=["-O3"], build_directory=str(build), verbose=True,
         extra_cuda_cflags=["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda", *half])
