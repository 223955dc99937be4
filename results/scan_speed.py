"""Times the selective scan, beside others, on the CPU and on a GPU if there is one.

    python results/scan_speed.py
    python results/scan_speed.py --device cpu

A line is for one size (batch, seqlen, dim, dstate) and dtype. It has the milliseconds of the
forward and of the backward pass. Then come others, with both passes together: 3.0x is three times
as long as ours. All times are medians.

On a GPU it also says how close each pass comes to two limits. "80 % of copying": a copy of as many
bytes as the pass must read and write takes 80 % of its time. "50 % of exp": the unit that computes
exponentials and reciprocals is busy for 50 % of its time.

Ours gets tensors with channels last in memory, as the Mamba has them. The others get them with time
last, as mamba_ssm wants them. mamba_ssm is timed if it is installed (see build_mamba_ssm.py).
"""
import argparse
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from scan_kernel import selective_scan, selective_scan_ref  # noqa: E402

CPU_SIZES = [(1, 1, 16, 1), (1, 257, 40, 16), (128, 27, 128, 16), (256, 17, 256, 16)]
GPU_SIZES = [(256, 31, 1568, 16), (8, 2048, 1536, 16), (8, 2048, 3072, 16)]
EXPS_PER_CLOCK = 16     # exponentials or reciprocals, of one multiprocessor


# The scans take u, delta, A, B, C, D, z, delta_bias. dt is the softplus of delta + delta_bias.


def ours(*inputs):
    return selective_scan(*inputs, delta_softplus=True)


def plain_loop(*inputs):
    return selective_scan_ref(*inputs, delta_softplus=True)


def doubling(u, delta, A, B, C, D, z, delta_bias):
    """The scan as a parallel one.

    After k rounds, a_t and h_t are what the 2^k steps up to t do together.
    """
    dt = F.softplus(delta + delta_bias[:, None])
    a = torch.exp(torch.einsum("bdl,dn->bdnl", dt, A))
    h = torch.einsum("bdl,bnl->bdnl", dt * u, B)
    step = 1
    while step < u.shape[2]:
        h = h + a * F.pad(h[..., :-step], (step, 0))
        a = a * F.pad(a[..., :-step], (step, 0), value=1.0)
        step *= 2
    y = torch.einsum("bdnl,bnl->bdl", h, C.to(h.dtype)) + D[:, None] * u
    return (y * F.silu(z)).to(u.dtype)


def mamba_ssm_scan(*inputs):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return selective_scan_fn(*inputs, delta_softplus=True)


def scan_inputs(batch, seqlen, dim, dstate, dtype=torch.float32, device="cpu"):
    """-> u, delta, A, B, C, D, z, delta_bias, time last in memory; A, D, delta_bias in float32"""
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(shape, device=device)

    def sequence(channels):
        return random(batch, channels, seqlen).to(dtype)

    A = -dstate * torch.rand(dim, dstate, device=device)
    inputs = [
        sequence(dim), sequence(dim), A, sequence(dstate), sequence(dstate), random(dim),
        sequence(dim), random(dim)
    ]
    return [x.requires_grad_() for x in inputs]


def channels_last(inputs):
    """The same inputs with the channels of sequences last in memory."""
    result = []
    for x in inputs:
        x = x.detach()
        if x.dim() == 3:
            x = x.mT.contiguous().mT
        result.append(x.requires_grad_())
    return result


def forward_and_backward(scan, inputs):
    y = scan(*inputs)
    return torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)


def milliseconds(function, device):
    """The median time of a call."""
    if device == "cuda":
        import triton
        return triton.testing.do_bench(function, return_mode="median")
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange().median


class GPULimits:
    """What the GPU can do in a millisecond: bytes read and written, exponentials."""

    def __init__(self):
        import triton
        memory = torch.empty(1 << 30, device="cuda")
        self.bytes = 2 * memory.nbytes / milliseconds(memory.clone, "cuda")
        chip = triton.runtime.driver.active.utils.get_device_properties(0)
        clocks = chip["sm_clock_rate"]                          # in kHz: those of a millisecond
        self.exps = EXPS_PER_CLOCK * chip["multiprocessor_count"] * clocks

    def shares(self, out, tensors, exps, time):
        """As text, for a pass that moves as many tensors like `out`, with exps for each number."""
        copying = tensors * out.nbytes / self.bytes / time
        computing = exps * out.numel() / self.exps / time
        return f"({copying:.0%} of copying, {computing:.0%} of exp)"


def benchmark(device, sizes, dtypes, rivals):
    """Prints a line for each size and dtype. The rivals are {name: scan}."""
    limits = GPULimits() if device == "cuda" else None
    for size in sizes:
        for dtype in dtypes:
            inputs = scan_inputs(*size, dtype, device)
            print(f"{size!s:20} {str(dtype)[6:]:8}", end="")
            time = benchmark_ours(device, channels_last(inputs), limits)
            for name, rival in rivals.items():
                try:
                    both = milliseconds(lambda: forward_and_backward(rival, inputs), device)
                    print(f" | {name} {both / time:.1f}x", end="", flush=True)
                except torch.OutOfMemoryError:
                    print(f" | {name} out of memory", end="", flush=True)
            print()


def benchmark_ours(device, inputs, limits):
    """Prints the times of `selective_scan` -> forward and backward together"""
    out = ours(*inputs)
    dout = torch.ones_like(out)

    def backward():
        return torch.autograd.grad(out, inputs, dout, retain_graph=True)

    forward_time = milliseconds(lambda: ours(*inputs), device)
    backward_time = milliseconds(backward, device)
    forward_share = backward_share = ""
    if limits is not None:
        # The forward pass moves u, delta, z and out, the backward pass those but out, dout and
        # three gradients. The numbers of exponentials are those of the machine code (speed.md).
        dstate = inputs[2].shape[1]
        forward_share = " " + limits.shares(out, 4, dstate + 4, forward_time)
        backward_share = " " + limits.shares(out, 7, 2 * dstate + 6, backward_time)
    print(f" | forward {forward_time:.3f}{forward_share}", end="")
    print(f", backward {backward_time:.3f}{backward_share}", end="", flush=True)
    return forward_time + backward_time


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="all there are by default")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("(batch, seqlen, dim, dstate), dtype | milliseconds of ours | others, forward + backward")
    if args.device != "cuda":
        benchmark("cpu", CPU_SIZES, [torch.float32], {"plain loop": plain_loop})
    if args.device == "cuda" or args.device is None and torch.cuda.is_available():
        rivals = {"plain loop": plain_loop, "doubling": doubling}
        if importlib.util.find_spec("selective_scan_cuda") is not None:
            rivals["mamba_ssm"] = mamba_ssm_scan
        print(torch.cuda.get_device_name())
        benchmark("cuda", GPU_SIZES, [torch.float32, torch.bfloat16], rivals)


if __name__ == "__main__":
    main()
