"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2) and its gradient.

It is written three times: as a plain loop, as Triton kernels for a GPU, and in PyTorch for a CPU.
The order here is that of a lesson: equations, loop, forward kernel, backward kernel, CPU, choice.

The equations, for one sequence and one channel. The state h has N numbers. A, B_t, C_t and a_t have
N numbers too; B_t and C_t are shared by all channels. u_t, dt_t, x_t and y_t are one number each.
Products are elementwise, and <,> is the sum over the N numbers.

    dt_t = softplus(delta_t + delta_bias)   how long the token acts                (Delta)
    a_t = exp(dt_t A)                       how much of the state is kept          (A-bar)
    h_t = a_t h_{t-1} + B_t x_t             the recurrence, with x_t = dt_t u_t    (equation 2a)
    y_t = <C_t, h_t> + D u_t                what is read from the state            (equation 2b)
    out_t = y_t silu(z_t)                   the gate

The scan starts from h_0 = initial_state, or from zeros.

The gradient. Write dX for the gradient of the loss with respect to X, and g_t for dh_t. The gate
gives dy_t = dout_t silu(z_t) and dz_t = dout_t y_t silu'(z_t). Both y_t and h_{t+1} use h_t, so:

    g_t = C_t dy_t + a_{t+1} g_{t+1}        the recurrence again, run from right to left
    dC_t = sum_channels h_t dy_t            dB_t = sum_channels g_t x_t
    dx_t = <B_t, g_t>                       du_t = dt_t dx_t + D dy_t
    w_t = a_t g_t h_{t-1}                   the gradient of the exponent dt_t A
    dA = sum_{b,t} dt_t w_t                 ddt_t = <A, w_t> + u_t dx_t
    dD = sum_{b,t} u_t dy_t                 ddelta_t = ddt_t sigmoid(delta_t + delta_bias)
    dh_0 = a_1 g_1                          ddelta_bias = sum_{b,t} ddelta_t

At the last step, the gradient of the last state stands in for a_{t+1} g_{t+1}. Sums over b are
over the sequences of the batch.

The gradient needs every h_t. All of them would take N times the memory of u. So the forward pass
saves only the state at the start of each chunk of time. The backward pass takes the chunks from
right to left and computes the states within a chunk again.
"""
import os

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton; the CPU path runs there
    triton = None


def check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """Raises ValueError for an argument of a form that the scan does not support."""
    if u.dim() != 3 or A.dim() != 2 or 0 in u.shape[1:] or 0 in A.shape:
        raise ValueError(
            f"u must be (batch, dim, seqlen) and A (dim, dstate), none of them 0 but batch, "
            f"got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    expected = {
        "u": (u, (batch, dim, seqlen)),
        "delta": (delta, (batch, dim, seqlen)),
        "A": (A, (dim, dstate)),
        "B": (B, (batch, dstate, seqlen)),
        "C": (C, (batch, dstate, seqlen)),
        "D": (D, (dim,)),
        "z": (z, (batch, dim, seqlen)),
        "delta_bias": (delta_bias, (dim,)),
        "initial_state": (initial_state, (batch, dim, dstate)),
    }
    for name, (x, shape) in expected.items():
        if x is None:
            continue
        if tuple(x.shape) != shape or x.device != u.device or not x.is_floating_point():
            raise ValueError(
                f"{name} must be a real tensor {shape} on {u.device}, got {x.dtype} "
                f"{tuple(x.shape)} on {x.device}. Complex A, and B and C that are constant or in "
                "groups, are not supported"
            )


def state_dtype(u):
    """The dtype in which states are kept: float32, or float64 for float64 inputs."""
    return torch.promote_types(u.dtype, torch.float32)


# The plain loop.


def selective_scan_ref(
    u, delta, A, B, C, D=None, z=None, delta_bias=None,
    delta_softplus=False, return_last_state=False, initial_state=None,
):
    """The equations, one time step after the other. For arguments see `selective_scan`."""
    check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype = state_dtype(u)
    u_, dt, A, B, C = u.to(dtype), delta.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    x = dt * u_
    if initial_state is None:
        h = u_.new_zeros(u.shape[0], *A.shape)                  # (batch, dim, dstate)
    else:
        h = initial_state.to(dtype)
    ys = []
    for dt_t, x_t, B_t, C_t in zip(dt.unbind(2), x.unbind(2), B.unbind(2), C.unbind(2)):
        a_t = torch.exp(dt_t[:, :, None] * A)
        h = a_t * h + x_t[:, :, None] * B_t[:, None, :]
        ys.append((h * C_t[:, None, :]).sum(2))
    y = torch.stack(ys, dim=2)                                  # (batch, dim, seqlen)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u_
    if z is not None:
        y = y * F.silu(z.to(dtype))
    out = y.to(u.dtype)
    return (out, h) if return_last_state else out


# The Triton kernels.

TRITON_CHUNK = 8  # time steps in a chunk: few, as the backward kernel holds all their states
BLOCK_D = 32      # channels of a program: one for each thread of a warp
NUM_WARPS = 1     # of a program

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)
    LN_2 = tl.constexpr(0.6931471805599453)

    # Each program works on one sequence and BLOCK_D of its channels. A state is a tile
    # (BLOCK_N, BLOCK_D). All tensors are contiguous, with channels last: u, delta, z, out are
    # (batch, seqlen, dim), B and C (batch, seqlen, dstate), A (dstate, dim), D and delta_bias
    # (dim), a state (batch, dstate, dim), and chunk_states (batch, chunks, dstate, dim).
    # None may stand for z, initial_state, dlast_state, the chunk_states of the forward kernel, and
    # the gradients of z and initial_state. Offsets have 64 bits.
    #
    # The kernels do not specialize `dim`. If the compiler knew that dim is a multiple of 16, it
    # would spread the states of one channel over several threads. Each sum over n would then need
    # shuffles between threads.

    @triton.jit
    def softplus(x):
        """log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), which cannot overflow.

        For small e, 1 + e is rounded. log(s) e / (s - 1) has no such error (Kahan's log1p).
        """
        e = tl.exp(-tl.abs(x))
        s = 1.0 + e
        log1p = tl.where(s == 1.0, e, tl.log(s) * (e / tl.where(s == 1.0, 1.0, s - 1.0)))
        return tl.maximum(x, 0.0) + log1p

    @triton.jit(do_not_specialize=["dim"])
    def forward_kernel(
        u, delta, A, B, C, D, z, delta_bias, initial_state,
        out, last_state, chunk_states,
        dim, seqlen, dstate,
        SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        n = tl.arange(0, BLOCK_N).to(tl.int64)
        in_d = d < dim
        in_n = n < dstate
        in_nd = in_n[:, None] & in_d[None, :]
        nd = n[:, None] * dim + d[None, :]

        # exp(dt A) = 2^(dt A log2(e)): the GPU computes powers of 2, so A is scaled once.
        A_log2 = tl.load(A + nd, in_nd, 0.0) * LOG2_E
        dtype: tl.constexpr = A_log2.dtype
        D_d = tl.load(D + d, in_d, 0.0)
        bias = tl.load(delta_bias + d, in_d, 0.0)
        h = tl.zeros((BLOCK_N, BLOCK_D), dtype)
        if initial_state is not None:
            h = tl.load(initial_state + b * dstate * dim + nd, in_nd, 0.0)

        for t in range(seqlen):
            if chunk_states is not None:
                if t % CHUNK == 0:
                    chunk = b * tl.cdiv(seqlen, CHUNK) + t // CHUNK
                    tl.store(chunk_states + chunk * dstate * dim + nd, h, in_nd)
            bt = b * seqlen + t
            u_t = tl.load(u + bt * dim + d, in_d, 0.0).to(dtype)
            dt = tl.load(delta + bt * dim + d, in_d, 0.0).to(dtype) + bias
            if SOFTPLUS:
                dt = softplus(dt)
            B_t = tl.load(B + bt * dstate + n, in_n, 0.0)
            C_t = tl.load(C + bt * dstate + n, in_n, 0.0)
            a = tl.exp2(dt[None, :] * A_log2)
            h = a * h + B_t[:, None] * (dt * u_t)[None, :]
            y = tl.sum(C_t[:, None] * h, 0) + D_d * u_t
            if z is not None:
                z_t = tl.load(z + bt * dim + d, in_d, 0.0).to(dtype)
                y *= z_t * tl.sigmoid(z_t)
            tl.store(out + bt * dim + d, y, in_d)
        tl.store(last_state + b * dstate * dim + nd, h, in_nd)

    @triton.jit
    def discretize(u, delta, B, A_log2, bias, td, tn, in_td, in_tn, SOFTPLUS: tl.constexpr):
        """-> u_t, delta_t + delta_bias, dt_t (BLOCK_D); B_t (BLOCK_N); a_t (BLOCK_N, BLOCK_D)

        td and tn are the offsets of step t. Behind the end, dt_t = 0 leaves the state as it is.
        """
        u_t = tl.load(u + td, in_td, 0.0).to(A_log2.dtype)
        raw = tl.load(delta + td, in_td, 0.0).to(A_log2.dtype) + bias
        dt = raw
        if SOFTPLUS:
            dt = softplus(raw)
        dt = tl.where(in_td, dt, 0.0)
        B_t = tl.load(B + tn, in_tn, 0.0)
        a = tl.exp2(dt[None, :] * A_log2)
        return u_t, raw, dt, B_t, a

    # A program of the backward kernel writes its own part of each sum over sequences or channels:
    # dA is (batch, dstate, dim), dD and ddelta_bias (batch, dim), dB and dC (batch, blocks,
    # seqlen, dstate). `triton_backward` adds the parts.

    @triton.jit(do_not_specialize=["dim"])
    def backward_kernel(
        u, delta, A, B, C, D, z, delta_bias, chunk_states, dout, dlast_state,
        du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state,
        dim, seqlen, dstate,
        SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        block = b * tl.num_programs(1) + tl.program_id(1)
        d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        n = tl.arange(0, BLOCK_N).to(tl.int64)
        in_d = d < dim
        in_n = n < dstate
        in_nd = in_n[:, None] & in_d[None, :]
        nd = n[:, None] * dim + d[None, :]

        A_log2 = tl.load(A + nd, in_nd, 0.0) * LOG2_E
        dtype: tl.constexpr = A_log2.dtype
        D_d = tl.load(D + d, in_d, 0.0)
        bias = tl.load(delta_bias + d, in_d, 0.0)
        ag = tl.zeros((BLOCK_N, BLOCK_D), dtype)                # a_{t+1} g_{t+1}
        if dlast_state is not None:
            ag = tl.load(dlast_state + b * dstate * dim + nd, in_nd, 0.0)
        dA_sum = tl.zeros((BLOCK_N, BLOCK_D), dtype)
        dD_sum = tl.zeros((BLOCK_D,), dtype)
        dbias_sum = tl.zeros((BLOCK_D,), dtype)

        chunks = tl.cdiv(seqlen, CHUNK)
        for j in range(chunks):
            k = chunks - 1 - j
            td = (b * seqlen + k * CHUNK) * dim + d             # the offsets of step t
            tn = (b * seqlen + k * CHUNK) * dstate + n
            part = (block * seqlen + (k + 1) * CHUNK) * dstate + n
            h = tl.load(chunk_states + (b * chunks + k) * dstate * dim + nd, in_nd, 0.0)
            hs = (h,)                                           # hs[i] is the state before step i
            for i in tl.static_range(CHUNK):
                in_td = in_d & (k * CHUNK + i < seqlen)
                in_tn = in_n & (k * CHUNK + i < seqlen)
                u_t, raw, dt, B_t, a = discretize(
                    u, delta, B, A_log2, bias, td, tn, in_td, in_tn, SOFTPLUS)
                h = a * h + B_t[:, None] * (dt * u_t)[None, :]
                hs += (h,)
                td += dim
                tn += dstate

            for i in tl.static_range(CHUNK - 1, -1, -1):
                in_td = in_d & (k * CHUNK + i < seqlen)
                in_tn = in_n & (k * CHUNK + i < seqlen)
                td -= dim
                tn -= dstate
                part -= dstate
                u_t, raw, dt, B_t, a = discretize(
                    u, delta, B, A_log2, bias, td, tn, in_td, in_tn, SOFTPLUS)
                C_t = tl.load(C + tn, in_tn, 0.0)
                dy = tl.load(dout + td, in_td, 0.0).to(dtype)
                if z is not None:
                    z_t = tl.load(z + td, in_td, 0.0).to(dtype)
                    s = tl.sigmoid(z_t)
                    y = tl.sum(C_t[:, None] * hs[i + 1], 0) + D_d * u_t
                    dz_t = dy * y * s * (1.0 + z_t * (1.0 - s))
                    tl.store(dz + td, dz_t, in_td)
                    dy *= z_t * s

                g = C_t[:, None] * dy[None, :] + ag
                ag = a * g
                w = ag * hs[i]
                dx = tl.sum(B_t[:, None] * g, 0)
                tl.store(du + td, dt * dx + D_d * dy, in_td)
                ddt = tl.sum(A_log2 * w, 0) * LN_2 + u_t * dx
                if SOFTPLUS:
                    ddt *= tl.sigmoid(raw)
                if dlast_state is not None:
                    ddt = tl.where(in_td, ddt, 0.0)             # behind the end, w need not be 0
                tl.store(ddelta + td, ddt, in_td)
                dA_sum += dt[None, :] * w
                dD_sum += dy * u_t
                dbias_sum += ddt
                tl.store(dB + part, tl.sum(g * (dt * u_t)[None, :], 1), in_tn)
                tl.store(dC + part, tl.sum(hs[i + 1] * dy[None, :], 1), in_tn)

        tl.store(dA + b * dstate * dim + nd, dA_sum, in_nd)
        tl.store(dD + b * dim + d, dD_sum, in_d)
        tl.store(ddelta_bias + b * dim + d, dbias_sum, in_d)
        if dinitial_state is not None:
            tl.store(dinitial_state + b * dstate * dim + nd, ag, in_nd)


def count_chunks(seqlen, chunk):
    return -(-seqlen // chunk)


def launch(kernel, tensors, u, A, delta_softplus):
    """Starts one program for each sequence and each block of channels."""
    batch, seqlen, dim = u.shape
    dstate = A.shape[0]
    with torch.cuda.device_of(u):                               # Triton uses the current device
        kernel[batch, triton.cdiv(dim, BLOCK_D)](
            *tensors, dim, seqlen, dstate, SOFTPLUS=delta_softplus, CHUNK=TRITON_CHUNK,
            BLOCK_N=triton.next_power_of_2(dstate), BLOCK_D=BLOCK_D, num_warps=NUM_WARPS
        )


def triton_forward(inputs, delta_softplus, save_states):
    """-> out, the last state, and the state at the start of each chunk or None.

    The inputs are u, delta, A, B, C, D, z, delta_bias, initial_state in the kernels' layout.
    """
    u, _, A = inputs[:3]
    batch, seqlen, _ = u.shape
    out = torch.empty_like(u)
    last_state = A.new_empty(batch, *A.shape)
    chunk_states = None
    if save_states:
        chunk_states = A.new_empty(batch, count_chunks(seqlen, TRITON_CHUNK), *A.shape)
    launch(forward_kernel, [*inputs, out, last_state, chunk_states], u, A, delta_softplus)
    return out, last_state, chunk_states


def triton_backward(dout, dlast_state, inputs, chunk_states, delta_softplus):
    """-> the gradients of the inputs, in the same order and layout; None for those that are None.

    The gradient of the last state may be None.
    """
    u, delta, A, B, _, _, z, _, initial_state = inputs
    batch, seqlen, dim = u.shape
    blocks = triton.cdiv(dim, BLOCK_D)
    du = torch.empty_like(u)
    ddelta = torch.empty_like(delta)
    dA = A.new_empty(batch, *A.shape)
    dB = B.new_empty(batch, blocks, seqlen, B.shape[2])
    dC = torch.empty_like(dB)
    dD = A.new_empty(batch, dim)
    dz = None if z is None else torch.empty_like(z)
    ddelta_bias = torch.empty_like(dD)
    dinitial_state = None if initial_state is None else torch.empty_like(dA)
    gradients = [du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state]
    tensors = [*inputs[:8], chunk_states, dout, dlast_state, *gradients]
    launch(backward_kernel, tensors, u, A, delta_softplus)
    dA, dD, ddelta_bias = dA.sum(0), dD.sum(0), ddelta_bias.sum(0)
    return du, ddelta, dA, dB.sum(1), dC.sum(1), dD, dz, ddelta_bias, dinitial_state


# The CPU path, in the same layout: PyTorch on pieces of a few sequences by a few steps, which fit
# into the cache.

CPU_CHUNK = 32          # time steps in a chunk
PIECE_SIZE = 1 << 19    # numbers, for each thread, in the states of a piece


def new_pieces(copies, u, A):
    """Memory for `copies` tensors with a state for each step: (copies, rows, steps, dstate, dim).

    Pieces reuse it. New memory for each piece would cost a quarter more time.
    """
    batch, seqlen, _ = u.shape
    steps = min(seqlen, CPU_CHUNK)
    rows = PIECE_SIZE * torch.get_num_threads() // (steps * A.numel())
    return A.new_empty(copies, max(1, min(rows, batch)), steps, *A.shape)


def cut(batch, seqlen, rows):
    """-> [(rows of the batch, chunk, its steps), ...], from left to right in time."""
    pieces = []
    for row in range(0, batch, rows):
        for chunk in range(count_chunks(seqlen, CPU_CHUNK)):
            steps = slice(chunk * CPU_CHUNK, min(seqlen, (chunk + 1) * CPU_CHUNK))
            pieces.append((slice(row, min(batch, row + rows)), chunk, steps))
    return pieces


def scan_piece(h, dt, x, A, B, memory):
    """The recurrence over a piece, from the state h -> a_t and h_t, (rows, steps, dstate, dim)."""
    rows, steps, _ = dt.shape
    a = memory[0, :rows, :steps]
    states = memory[1, :rows, :steps]
    torch.mul(dt[:, :, None, :], A, out=a).exp_()
    torch.mul(x[:, :, None, :], B[:, :, :, None], out=states)   # B_t x_t; the loop makes it h_t
    for a_t, h_t in zip(a.unbind(1), states.unbind(1)):
        h = h_t.addcmul_(a_t, h)
    return a, states


def cpu_forward(inputs, delta_softplus, save_states):
    """As `triton_forward`."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    batch, seqlen, _ = u.shape
    out_dtype = u.dtype
    u = u.to(A.dtype)
    dt = delta.to(A.dtype) + delta_bias
    if delta_softplus:
        dt = F.softplus(dt)
    x = dt * u
    y = torch.empty_like(u)
    state = A.new_zeros(batch, *A.shape)
    if initial_state is not None:
        state.copy_(initial_state)
    chunk_states = None
    if save_states:
        chunk_states = A.new_empty(batch, count_chunks(seqlen, CPU_CHUNK), *A.shape)

    memory = new_pieces(2, u, A)
    for rows, chunk, steps in cut(batch, seqlen, memory.shape[1]):
        if save_states:
            chunk_states[rows, chunk] = state[rows]
        piece = rows, steps
        _, h = scan_piece(state[rows], dt[piece], x[piece], A, B[piece], memory)
        state[rows] = h[:, -1]
        y[piece] = torch.einsum("btn,btnd->btd", C[piece], h)
    y.addcmul_(D, u)
    if z is not None:
        y *= F.silu(z.to(A.dtype))
    return y.to(out_dtype), state, chunk_states


def cpu_backward(dout, dlast_state, inputs, chunk_states, delta_softplus):
    """As `triton_backward`."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    batch, seqlen, _ = u.shape
    u_dtype = u.dtype
    u = u.to(A.dtype)
    dout = dout.to(A.dtype)
    raw = delta.to(A.dtype) + delta_bias
    dt = F.softplus(raw) if delta_softplus else raw
    x = dt * u
    y = torch.empty_like(u)
    dy = dout if z is None else dout * F.silu(z.to(A.dtype))
    dx, ddt, dB, dC = [torch.empty_like(like) for like in (x, dt, B, C)]
    dA = torch.zeros_like(A)
    carry = A.new_zeros(batch, *A.shape)                        # a_{t+1} g_{t+1}
    if dlast_state is not None:
        carry.copy_(dlast_state)

    memory = new_pieces(3, u, A)
    for rows, chunk, steps in reversed(cut(batch, seqlen, memory.shape[1])):
        piece = rows, steps
        h_before = chunk_states[rows, chunk]
        a, h = scan_piece(h_before, dt[piece], x[piece], A, B[piece], memory)
        if z is not None:                                       # dz needs y
            y[piece] = torch.einsum("btn,btnd->btd", C[piece], h)
        dC[piece] = torch.einsum("btd,btnd->btn", dy[piece], h)
        g = memory[2, :h.shape[0], :h.shape[1]]                 # C_t dy_t; the loop makes it g_t
        torch.mul(dy[piece][:, :, None, :], C[piece][:, :, :, None], out=g)
        a_t, g_t = a.unbind(1), g.unbind(1)
        g_t[-1].add_(carry[rows])
        for t in range(len(g_t) - 2, -1, -1):
            g_t[t].addcmul_(a_t[t + 1], g_t[t + 1])
        dB[piece] = torch.einsum("btd,btnd->btn", x[piece], g)
        dx[piece] = torch.einsum("btn,btnd->btd", B[piece], g)
        w = a.mul_(g)                                           # a_t g_t, in the memory of a
        carry[rows] = w[:, 0]
        w[:, 1:] *= h[:, :-1]                                   # times h_{t-1}: now it is w_t
        w[:, 0] *= h_before
        scratch = g                                             # g is not needed any more
        ddt[piece] = torch.mul(w, A, out=scratch).sum(2)
        dA += torch.mul(w, dt[piece][:, :, None, :], out=scratch).sum((0, 1))

    dz = None
    if z is not None:
        dz = torch.ops.aten.silu_backward(y.addcmul_(D, u).mul_(dout), z.to(A.dtype)).to(z.dtype)
    ddt.addcmul_(u, dx)
    if delta_softplus:
        ddt *= torch.sigmoid(raw)
    dD = (u * dy).sum((0, 1))
    du = dx.mul_(dt).addcmul_(D, dy).to(u_dtype)
    dinitial_state = None if initial_state is None else carry
    return du, ddt.to(delta.dtype), dA, dB, dC, dD, dz, ddt.sum((0, 1)), dinitial_state


# Both as one operator of PyTorch, so that autograd and torch.compile take a scan as a whole.


def swapped(x):
    """x with its last two dimensions swapped, contiguous; a vector and None as they are.

    Channels come last then. Neighbouring channels lie side by side in memory, as the threads of a
    GPU and the vectors of a CPU want them.
    """
    if x is None:
        return None
    return x.mT.contiguous() if x.dim() > 1 else x.contiguous()


def gradients_swapped(gradients, u):
    """Gradients in the layout of the inputs. An operator cannot return None: empty instead."""
    result = []
    for x in gradients:
        if x is None:
            result.append(u.new_empty(0))
        else:
            result.append(x.mT if x.dim() > 1 else x)
    return tuple(result)


# The signatures of the operators, in PyTorch's language for them.
INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, "
    "Tensor delta_bias, Tensor? initial_state"
)
FORWARD = (
    f"({INPUTS}, bool delta_softplus, bool save_states, bool use_triton) "
    "-> (Tensor out, Tensor last_state, Tensor chunk_states)"
)
BACKWARD = (
    f"(Tensor dout, Tensor? dlast_state, {INPUTS}, Tensor chunk_states, bool delta_softplus, "
    "bool use_triton) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, "
    "Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)"
)


@torch.library.custom_op("pathstar::scan", mutates_args=(), schema=FORWARD)
def scan_op(*arguments):
    *inputs, delta_softplus, save_states, use_triton = arguments
    forward = triton_forward if use_triton else cpu_forward
    inputs = [swapped(x) for x in inputs]
    with torch.autocast(inputs[0].device.type, enabled=False):  # products of states stay float32
        out, last_state, chunk_states = forward(inputs, delta_softplus, save_states)
    if chunk_states is None:
        chunk_states = out.new_empty(0)
    return out.mT, last_state.mT, chunk_states


@scan_op.register_fake
def fake_scan(*arguments):
    """Shapes, strides and dtypes without the work, for torch.compile."""
    *inputs, _, save_states, use_triton = arguments
    u, A = swapped(inputs[0]), swapped(inputs[2])
    batch, seqlen, _ = u.shape
    chunks = count_chunks(seqlen, TRITON_CHUNK if use_triton else CPU_CHUNK)
    out = torch.empty_like(u)
    last_state = A.new_empty(batch, *A.shape)
    chunk_states = A.new_empty(batch, chunks, *A.shape) if save_states else out.new_empty(0)
    return out.mT, last_state.mT, chunk_states


@torch.library.custom_op("pathstar::scan_backward", mutates_args=(), schema=BACKWARD)
def scan_backward_op(dout, dlast_state, *arguments):
    *inputs, chunk_states, delta_softplus, use_triton = arguments
    backward = triton_backward if use_triton else cpu_backward
    u = inputs[0]
    inputs = [swapped(x) for x in inputs]
    dout, dlast_state = swapped(dout), swapped(dlast_state)
    with torch.autocast(u.device.type, enabled=False):
        gradients = backward(dout, dlast_state, inputs, chunk_states, delta_softplus)
    return gradients_swapped(gradients, u)


@scan_backward_op.register_fake
def fake_scan_backward(dout, dlast_state, *arguments):
    *inputs, _, _, _ = arguments
    gradients = [None if x is None else torch.empty_like(swapped(x)) for x in inputs]
    return gradients_swapped(gradients, dout)


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _, ctx.use_triton = inputs
    _, _, chunk_states = output
    ctx.save_for_backward(*tensors, chunk_states)
    ctx.set_materialize_grads(False)  # the gradient of an output that is not used is None then


def scan_gradients(ctx, dout, dlast_state, _dchunk_states):
    *inputs, chunk_states = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(inputs[0])
    gradients = scan_backward_op(
        dout, dlast_state, *inputs, chunk_states, ctx.delta_softplus, ctx.use_triton
    )
    gradients = [None if x is None else dx for x, dx in zip(inputs, gradients)]
    return *gradients, None, None, None  # the three flags have none


scan_op.register_autograd(scan_gradients, setup_context=save_for_backward)


def fast_scan(inputs, delta_softplus, return_last_state, use_triton):
    """The scan by `scan_op`, which needs D and delta_bias, and all but u, delta, z in one dtype."""
    check_arguments(*inputs)
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    if D is None:
        D = u.new_zeros(u.shape[1])
    if delta_bias is None:
        delta_bias = u.new_zeros(u.shape[1])
    dtype = state_dtype(u)
    A, B, C, D, delta_bias = [x.to(dtype) for x in (A, B, C, D, delta_bias)]
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
    inputs = u, delta, A, B, C, D, z, delta_bias, initial_state
    out, last_state, _ = scan_op(*inputs, delta_softplus, torch.is_grad_enabled(), use_triton)
    return (out, last_state) if return_last_state else out


def selective_scan_triton(
    u, delta, A, B, C, D=None, z=None, delta_bias=None,
    delta_softplus=False, return_last_state=False, initial_state=None
):
    """The scan by the Triton kernels. For arguments see `selective_scan`.

    Raises RuntimeError where Triton cannot run.
    """
    if triton is None or not (u.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise RuntimeError(
            "selective_scan_triton needs Triton and a GPU, "
            "or the environment variable TRITON_INTERPRET=1 before Python starts"
        )
    inputs = u, delta, A, B, C, D, z, delta_bias, initial_state
    return fast_scan(inputs, delta_softplus, return_last_state, use_triton=True)


def selective_scan_cpu(
    u, delta, A, B, C, D=None, z=None, delta_bias=None,
    delta_softplus=False, return_last_state=False, initial_state=None
):
    """The scan by PyTorch in pieces. For arguments see `selective_scan`."""
    inputs = u, delta, A, B, C, D, z, delta_bias, initial_state
    return fast_scan(inputs, delta_softplus, return_last_state, use_triton=False)


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None,
    delta_softplus=False, return_last_state=False, initial_state=None
):
    """Runs the scan in the fastest way for the device and size.

    The arguments are those of `selective_scan_fn` in the mamba_ssm package, and a last one:

    u              (batch, dim, seqlen)      the input; any strides, as for all tensors
    delta          (batch, dim, seqlen)      Delta, before delta_bias and softplus
    A              (dim, dstate)             real
    B, C           (batch, dstate, seqlen)   how a token writes to the state and reads from it
    D              (dim,)                    the skip connection, or None
    z              (batch, dim, seqlen)      the gate, or None
    delta_bias     (dim,)                    added to delta, or None
    delta_softplus                           whether dt is the softplus of delta + delta_bias
    initial_state  (batch, dim, dstate)      the state before the first step; None for zeros

    Returns out (batch, dim, seqlen) in u's dtype. With return_last_state, returns also the state
    after the last step (batch, dim, dstate), in float32, or float64 for u in float64. Gradients
    flow through both, to all tensors. Raises ValueError for arguments of another form.
    """
    check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    seqlen = u.shape[2]
    work = u.numel() * A.shape[1]
    if u.is_cuda and triton is not None:
        scan = selective_scan_triton
    elif seqlen == 1 or work < 1000:
        scan = selective_scan_ref  # the CPU path would cost more than it saves
    else:
        scan = selective_scan_cpu
    return scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state)


def main():
    """Prints how long a scan takes here, beside the plain loop."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, seqlen, dim, dstate = 128, 31, 256, 16
    u, delta, z = torch.randn(3, batch, dim, seqlen, device=device)
    B, C = torch.randn(2, batch, dstate, seqlen, device=device)
    A = -torch.rand(dim, dstate, device=device)
    inputs = [x.requires_grad_() for x in (u, delta, A, B, C)]
    print(f"batch {batch}, seqlen {seqlen}, dim {dim}, dstate {dstate}, {device}, 1 thread")
    for scan in (selective_scan, selective_scan_ref):
        def forward_and_backward():
            scan(*inputs, z=z, delta_softplus=True).sum().backward()

        timer = Timer("f()", globals={"f": forward_and_backward}, num_threads=1)
        milliseconds = 1000 * timer.blocked_autorange().median
        print(f"{scan.__name__:20} forward and backward {milliseconds:8.2f} ms")


if __name__ == "__main__":
    main()
