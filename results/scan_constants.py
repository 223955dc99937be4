"""Times the Triton kernels with other block sizes, on a GPU: python results/scan_constants.py

Each line is for BLOCK_D channels a program, its warps, TRITON_CHUNK time steps a chunk, a size
(batch, seqlen, dim, dstate) and a dtype. The first of them are the constants of scan_kernel.py.
"""
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import scan_kernel  # noqa: E402
from scan_speed import channels_last, milliseconds, ours, scan_inputs  # noqa: E402

CONSTANTS = [(32, 1, 8), (64, 2, 8), (128, 4, 8), (64, 1, 8), (32, 1, 4), (32, 1, 16)]
SIZES = [(256, 31, 1568, 16), (8, 2048, 1536, 16)]


def launch_with(num_warps):
    """`scan_kernel.launch`, with so many warps for a program."""
    def launch(kernel, tensors, u, A, delta_softplus):
        batch, seqlen, dim = u.shape
        dstate = A.shape[0]
        blocks = scan_kernel.triton.cdiv(dim, scan_kernel.BLOCK_D)
        kernel[batch, blocks](
            *tensors, dim, seqlen, dstate, SOFTPLUS=delta_softplus,
            CHUNK=scan_kernel.TRITON_CHUNK, BLOCK_D=scan_kernel.BLOCK_D,
            BLOCK_N=scan_kernel.triton.next_power_of_2(dstate), num_warps=num_warps
        )
    return launch


def main():
    for block_d, num_warps, chunk in CONSTANTS:
        scan_kernel.BLOCK_D = block_d
        scan_kernel.TRITON_CHUNK = chunk
        scan_kernel.launch = launch_with(num_warps)
        for size in SIZES:
            for dtype in (torch.bfloat16, torch.float32):
                inputs = channels_last(scan_inputs(*size, dtype, "cuda"))
                out = ours(*inputs)
                dout = torch.ones_like(out)

                def backward():
                    return torch.autograd.grad(out, inputs, dout, retain_graph=True)

                forward_ms = milliseconds(lambda: ours(*inputs), "cuda")
                backward_ms = milliseconds(backward, "cuda")
                constants = f"BLOCK_D {block_d} warps {num_warps} CHUNK {chunk}"
                print(
                    f"{constants} {size} {str(dtype)[6:]:9} forward {forward_ms:.3f} "
                    f"backward {backward_ms:.3f} ms", flush=True
                )


if __name__ == "__main__":
    main()
