"""Times the scan of scan_kernel.py beside others, and prints a table for results/README.md.

    pip install mambapy==1.2.0
    python results/scripts/speed.py             on a GPU if there is one, else with one CPU thread

Beside ours: the plain loop below under autograd, mambapy's parallel scan, mamba_ssm's CUDA, if they
are installed, and as a yardstick a copy of the inputs u, delta and z. All take turns, forward and
backward. Their cells say how many times as long as ours they take, from medians.
"""
import argparse
import importlib.util
import statistics
import time
from functools import partial
from importlib.metadata import version

import torch
import torch.nn.functional as F

from tables import markdown
from reproduce import commit
from scan_kernel import selective_scan                          # tables.py makes these importable
from train import make_header

SIZES = {               # batch, seqlen, dim, dstate
    "cpu": [(32, 31, 128, 16), (256, 17, 256, 16), (8, 512, 256, 16)],
    "cuda": [(256, 31, 1568, 16), (256, 247, 768, 16), (8, 2048, 1536, 16), (1, 8192, 1536, 16)],
}


def ours(*inputs):
    """All scans get u, delta, A, B, C, D, z, delta_bias, with delta before the softplus."""
    return selective_scan(*inputs, delta_softplus=True)


def plain_loop(u, delta, A, B, C, D, z, delta_bias):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,  y_t = <C_t, h_t> + D u_t, one step at a time."""
    dt = F.softplus(delta + delta_bias[:, None])
    h, y = torch.zeros_like(u[:, :, 0, None] * A), []           # (batch, dim, dstate)
    for dt_t, x_t, B_t, C_t in zip(*(x.unbind(2) for x in (dt, dt * u, B, C))):
        h = torch.exp(dt_t[:, :, None] * A) * h + x_t[:, :, None] * B_t[:, None]
        y.append((h * C_t[:, None]).sum(2))
    return (torch.stack(y, dim=2) + D[:, None] * u) * F.silu(z)


def mambapy(u, delta, A, B, C, D, z, delta_bias):
    """mambapy's pscan, from this layout and back."""
    from mambapy.mamba import MambaBlock
    dt = F.softplus(delta.mT + delta_bias)
    return (MambaBlock.selective_scan(None, u.mT, dt, A, B.mT, C.mT, D) * F.silu(z.mT)).mT


def mamba_ssm(*inputs):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return selective_scan_fn(*inputs, delta_softplus=True)


def draw_inputs(batch, seqlen, dim, dstate, device, dtype):
    """Sequences (batch, channels, seqlen) lie with channels last in memory, as in the Mamba."""
    torch.manual_seed(0)

    def sequence(channels):
        return torch.randn(batch, seqlen, channels, device=device).to(dtype).mT

    A = -dstate * torch.rand(dim, dstate, device=device)
    D, delta_bias = torch.randn(2, dim, device=device)
    inputs = [
        sequence(dim), sequence(dim), A, sequence(dstate), sequence(dstate), D, sequence(dim),
        delta_bias
    ]
    return [x.detach().requires_grad_() for x in inputs]


def forward_and_backward(scan, inputs):
    y = scan(*inputs)
    torch.autograd.grad(y, inputs, torch.ones_like(y))


def take_turns(calls, seconds):
    """Calls functions in turn, for about so many seconds -> {name: median milliseconds}"""
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 6:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - began))
    # The first round was to warm up.
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}


def time_scans(size, device, dtype):
    """-> the cells of a row: milliseconds of ours, ratios of the others"""
    inputs = draw_inputs(*size, device, dtype)
    expected = ours(*inputs).float()
    calls = {"ours": partial(forward_and_backward, ours, inputs)}
    for scan in (plain_loop, mambapy, mamba_ssm):
        name, given = scan.__name__, inputs
        if scan != plain_loop and importlib.util.find_spec(name) is None:
            continue
        if scan == mambapy and dtype != torch.float32:          # it refuses a mixture
            continue
        if scan == mamba_ssm:                                   # which wants time last
            given = [x.detach().contiguous().requires_grad_() for x in inputs]
        error = (scan(*given).float() - expected).norm() / expected.norm()
        assert error < 0.02, (name, size, dtype, error)
        calls[name] = partial(forward_and_backward, scan, given)
    calls["copy"] = lambda: [inputs[i].detach().clone() for i in (0, 1, 6)]
    ms = take_turns(calls, seconds=4)
    others = ("plain_loop", "mambapy", "mamba_ssm", "copy")
    ratios = [f"{ms[name] / ms['ours']:.2g}" if name in ms else "-" for name in others]
    return [size, str(dtype)[6:], f"{ms['ours']:.3g}", *ratios]


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    torch.set_num_threads(1)
    device, dtypes = "cpu", [torch.float32]
    if torch.cuda.is_available():
        device, dtypes = "cuda", [torch.float32, torch.bfloat16]
    run = argparse.Namespace(device=device, out_dir=None, overwrite=None, resume=None)
    machine = make_header(run, torch.zeros(2, 0))["machine"]    # as in the logs
    rows = [time_scans(size, device, dtype) for size in SIZES[device] for dtype in dtypes]
    versions = [f"{name} {version(name)}" for name in ("torch", "triton", "mambapy", "mamba_ssm")
                if importlib.util.find_spec(name)]
    print(f"Made at commit {commit()}: {machine},\n{', '.join(versions)}.\n")
    names = ["ours, ms", "plain loop", "mambapy", "mamba_ssm", "copy"]
    print(markdown(["batch, seqlen, dim, dstate", "dtype", *names], rows), end="")


if __name__ == "__main__":
    main()
