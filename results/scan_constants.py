"""Times the Triton kernels with other block sizes, on a GPU: python results/scan_constants.py

Each line is for other constants of scan_kernel.py (BLOCK_D, NUM_WARPS, TRITON_CHUNK), a size
(batch, seqlen, dim, dstate) and a dtype. The first are those in use.
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


def main():
    for block_d, num_warps, chunk in CONSTANTS:
        scan_kernel.BLOCK_D = block_d
        scan_kernel.NUM_WARPS = num_warps
        scan_kernel.TRITON_CHUNK = chunk
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
