"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2) and its gradient.

At its heart is one recurrence. It is written three times: as a plain loop, as Triton kernels for a
GPU, and in PyTorch for a CPU. The order here is that of a lesson: equations, loop, forward kernel,
backward kernel, CPU path, autograd, choice. `selective_scan`, at the end, puts the rest of the
equations around the recurrence.

The equations, for one sequence and one channel. The state h has N numbers. A, B_t, C_t and a_t have
N numbers too; B_t and C_t are shared by all channels. u_t, dt_t, x_t and y_t are one number each.
Products are elementwise, and <,> is the sum over the N numbers.

    dt_t = softplus(delta_t + delta_bias)   how long the token acts                (Delta)
    x_t = dt_t u_t                          what it writes, into the directions B_t
    a_t = exp(dt_t A)                       how much of the state is kept          (A-bar)
    h_t = a_t h_{t-1} + B_t x_t             the recurrence                         (equation 2a)
    y_t = <C_t, h_t>                        what is read from the state            (equation 2b)
    out_t = (y_t + D u_t) silu(z_t)         the skip connection and the gate

The paper's equation 4 has a longer factor of B_t in place of dt_t. Mamba's code takes dt_t, the
first term of its series (Euler's rule), and so does this file.

The gradient of the recurrence, with x and dt as inputs of their own; autograd does the rest. Write
dX for the gradient of the loss with respect to X, and g_t for dh_t. Both y_t and h_{t+1} use h_t,
so:

    g_t = C_t dy_t + a_{t+1} g_{t+1}        the recurrence again, run from right to left
    dx_t = <B_t, g_t>
    dB_t = sum_channels g_t x_t             dC_t = sum_channels h_t dy_t
    w_t = a_t g_t h_{t-1}                   the gradient of the exponent dt_t A
    ddt_t = <A, w_t>                        dA = sum_{b,t} dt_t w_t
    dh_0 = a_1 g_1

At the last step, the gradient of the last state stands in for a_{t+1} g_{t+1}. The sum over b is
over the sequences of the batch.

The gradient needs every h_t. All of them would take N times the memory of x. So the forward pass
saves only the state at the start of each chunk of time. The backward pass takes the chunks from
right to left and computes the states within a chunk again.

All functions of the recurrence take and return tensors with channels last, in one dtype:

    x, dt, y        (batch, seqlen, dim)
    A               (dstate, dim)
    B, C            (batch, seqlen, dstate)
    a state         (batch, dstate, dim)
    chunk_states    (batch, chunks, dstate, dim)

Neighbouring channels lie side by side in memory then, as the threads of a GPU and the vectors of a
CPU want them.
"""
import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton; the CPU path runs there
    triton = None


# The plain loop.


def scan_ref(x, dt, A, B, C, initial_state):
    """The recurrence, one time step after the other -> y, the last state"""
    x = x.unsqueeze(2).unbind(1)        # x_t, dt_t (batch, 1, dim) for each t
    dt = dt.unsqueeze(2).unbind(1)
    B = B.unsqueeze(3).unbind(1)        # B_t, C_t (batch, dstate, 1)
    C = C.unsqueeze(3).unbind(1)
    h = initial_state
    ys = []
    for x_t, dt_t, B_t, C_t in zip(x, dt, B, C):
        a_t = torch.exp(dt_t * A)
        h = a_t * h + B_t * x_t
        ys.append((C_t * h).sum(1))
    return torch.stack(ys, dim=1), h.clone()  # autograd keeps h: the copy may be changed


# The Triton kernels.

TRITON_CHUNK = 8  # time steps in a chunk: few, as the backward kernel holds all their states
BLOCK_D = 32      # channels of a program: one for each thread of a warp
NUM_WARPS = 1     # of a program

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)  # a GPU computes powers of 2: e^x = 2^(x log2(e))

    # Each program works on one sequence and BLOCK_D of its channels. A state is a tile
    # (BLOCK_N, BLOCK_D), x_t and dt_t are (1, BLOCK_D), B_t and C_t (BLOCK_N, 1). All tensors are
    # contiguous. td, tn and nd are offsets of such tiles, with 64 bits.
    #
    # The kernels do not specialize `dim`. If the compiler knew that dim is a multiple of 16, it
    # would spread the states of one channel over several threads. Each sum over n would then need
    # shuffles between threads.

    @triton.jit(do_not_specialize=["dim"])
    def forward_kernel(
        x, dt, A, B, C, initial_state,
        y, last_state, chunk_states,                            # chunk_states may be None
        dim, seqlen, dstate,
        CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        n = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
        in_d = d < dim
        in_n = n < dstate
        in_nd = in_n & in_d
        nd = n * dim + d

        A_nd = tl.load(A + nd, in_nd, 0.0)
        h = tl.load(initial_state + b * dstate * dim + nd, in_nd, 0.0)
        for t in range(seqlen):
            if chunk_states is not None:
                if t % CHUNK == 0:
                    chunk = b * tl.cdiv(seqlen, CHUNK) + t // CHUNK
                    tl.store(chunk_states + chunk * dstate * dim + nd, h, in_nd)
            td = (b * seqlen + t) * dim + d
            tn = (b * seqlen + t) * dstate + n
            x_t = tl.load(x + td, in_d, 0.0)
            dt_t = tl.load(dt + td, in_d, 0.0)
            B_t = tl.load(B + tn, in_n, 0.0)
            C_t = tl.load(C + tn, in_n, 0.0)
            a_t = tl.exp2(dt_t * LOG2_E * A_nd)
            h = a_t * h + B_t * x_t
            tl.store(y + td, tl.sum(C_t * h, 0, keep_dims=True), in_d)
        tl.store(last_state + b * dstate * dim + nd, h, in_nd)

    # A program of the backward kernel writes its own part of each sum over sequences or channels:
    # dA is (batch, dstate, dim), dB and dC (batch, blocks, seqlen, dstate). `triton_backward` adds
    # the parts.

    @triton.jit(do_not_specialize=["dim"])
    def backward_kernel(
        x, dt, A, B, C, chunk_states, dy, dlast_state,          # dlast_state may be None
        dx, ddt, dA, dB, dC, dinitial_state,
        dim, seqlen, dstate,
        CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        block = b * tl.num_programs(1) + tl.program_id(1)       # counts the programs
        d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        n = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
        in_d = d < dim
        in_n = n < dstate
        in_nd = in_n & in_d
        nd = n * dim + d

        A_nd = tl.load(A + nd, in_nd, 0.0)
        ag = tl.zeros((BLOCK_N, BLOCK_D), A_nd.dtype)           # a_{t+1} g_{t+1}
        if dlast_state is not None:
            ag = tl.load(dlast_state + b * dstate * dim + nd, in_nd, 0.0)
        dA_sum = tl.zeros((BLOCK_N, BLOCK_D), A_nd.dtype)

        chunks = tl.cdiv(seqlen, CHUNK)
        for j in range(chunks):
            k = chunks - 1 - j
            # hs[i] is the state before step i of the chunk. A kernel has no arrays, but a tuple may
            # grow while the compiler unrolls a static_range: then each hs[i] is a value of its own.
            h = tl.load(chunk_states + (b * chunks + k) * dstate * dim + nd, in_nd, 0.0)
            hs = (h,)
            for i in tl.static_range(CHUNK):
                t = k * CHUNK + i
                td = (b * seqlen + t) * dim + d
                tn = (b * seqlen + t) * dstate + n
                x_t = tl.load(x + td, in_d & (t < seqlen), 0.0)
                dt_t = tl.load(dt + td, in_d & (t < seqlen), 0.0)
                B_t = tl.load(B + tn, in_n & (t < seqlen), 0.0)
                a_t = tl.exp2(dt_t * LOG2_E * A_nd)
                h = a_t * h + B_t * x_t
                hs += (h,)

            for i in tl.static_range(CHUNK - 1, -1, -1):
                t = k * CHUNK + i
                if t < seqlen:
                    td = (b * seqlen + t) * dim + d
                    tn = (b * seqlen + t) * dstate + n
                    x_t = tl.load(x + td, in_d, 0.0)
                    dt_t = tl.load(dt + td, in_d, 0.0)
                    B_t = tl.load(B + tn, in_n, 0.0)
                    C_t = tl.load(C + tn, in_n, 0.0)
                    dy_t = tl.load(dy + td, in_d, 0.0)
                    a_t = tl.exp2(dt_t * LOG2_E * A_nd)
                    g = C_t * dy_t + ag
                    ag = a_t * g
                    w = ag * hs[i]
                    dA_sum += dt_t * w
                    tl.store(dx + td, tl.sum(B_t * g, 0, keep_dims=True), in_d)
                    tl.store(ddt + td, tl.sum(A_nd * w, 0, keep_dims=True), in_d)
                    part = (block * seqlen + t) * dstate + n
                    tl.store(dB + part, tl.sum(g * x_t, 1, keep_dims=True), in_n)
                    tl.store(dC + part, tl.sum(hs[i + 1] * dy_t, 1, keep_dims=True), in_n)

        tl.store(dA + b * dstate * dim + nd, dA_sum, in_nd)
        tl.store(dinitial_state + b * dstate * dim + nd, ag, in_nd)


def launch(kernel, tensors, batch, seqlen, dim, dstate):
    """Starts one program for each sequence and each block of channels."""
    with torch.cuda.device_of(tensors[0]):                      # Triton uses the current device
        kernel[batch, triton.cdiv(dim, BLOCK_D)](
            *tensors, dim, seqlen, dstate, CHUNK=TRITON_CHUNK,
            BLOCK_N=triton.next_power_of_2(dstate), BLOCK_D=BLOCK_D, num_warps=NUM_WARPS
        )


def triton_forward(x, dt, A, B, C, initial_state, save_states):
    """-> y, the last state, and the state at the start of each chunk (no chunks unless saved)"""
    batch, seqlen, dim = x.shape
    dstate = A.shape[0]
    y = torch.empty_like(x)
    last_state = torch.empty_like(initial_state)
    chunks = triton.cdiv(seqlen, TRITON_CHUNK) if save_states else 0
    chunk_states = x.new_empty(batch, chunks, dstate, dim)
    tensors = [x, dt, A, B, C, initial_state, y, last_state, chunk_states if save_states else None]
    launch(forward_kernel, tensors, batch, seqlen, dim, dstate)
    return y, last_state, chunk_states


def triton_backward(x, dt, A, B, C, chunk_states, dy, dlast_state):
    """-> the gradients of x, dt, A, B, C and the initial state. dlast_state may be None."""
    batch, seqlen, dim = x.shape
    dstate = A.shape[0]
    dx = torch.empty_like(x)
    ddt = torch.empty_like(dt)
    dA = A.new_empty(batch, dstate, dim)
    dB = B.new_empty(batch, triton.cdiv(dim, BLOCK_D), seqlen, dstate)
    dC = torch.empty_like(dB)
    dinitial_state = torch.empty_like(dA)
    tensors = [x, dt, A, B, C, chunk_states, dy, dlast_state]
    tensors += [dx, ddt, dA, dB, dC, dinitial_state]
    launch(backward_kernel, tensors, batch, seqlen, dim, dstate)
    return dx, ddt, dA.sum(0), dB.sum(1), dC.sum(1), dinitial_state


# The CPU path: PyTorch on pieces of a few sequences by a few steps, which fit into the cache.

CPU_CHUNK = 32          # time steps in a chunk
PIECE_SIZE = 1 << 19    # numbers, for each thread, in the states of a piece


def cut(x, A, copies):
    """-> pieces [(rows of the batch, time steps, chunk), ...] in the order of time, and memory

    The memory is for `copies` tensors with a state for each step of a piece: (copies, rows, steps,
    dstate, dim). All pieces use it. New memory for each would cost a quarter more time.
    """
    batch, seqlen, _ = x.shape
    n_steps = min(seqlen, CPU_CHUNK)
    n_rows = PIECE_SIZE * torch.get_num_threads() // (n_steps * A.numel())
    n_rows = max(1, min(n_rows, batch))
    pieces = []
    for row in range(0, batch, n_rows):
        for chunk, step in enumerate(range(0, seqlen, n_steps)):
            pieces.append((slice(row, row + n_rows), slice(step, step + n_steps), chunk))
    return pieces, A.new_empty(copies, n_rows, n_steps, *A.shape)


def scan_piece(h, x, dt, A, B, memory):
    """The recurrence over a piece, from the state h -> a_t and h_t, (rows, steps, dstate, dim)"""
    rows, steps, _ = x.shape
    a = memory[0, :rows, :steps]
    states = memory[1, :rows, :steps]
    torch.mul(dt.unsqueeze(2), A, out=a).exp_()
    torch.mul(B.unsqueeze(3), x.unsqueeze(2), out=states)       # B_t x_t; the loop makes it h_t
    for a_t, h_t in zip(a.unbind(1), states.unbind(1)):
        h = h_t.addcmul_(a_t, h)
    return a, states


def cpu_forward(x, dt, A, B, C, initial_state, save_states):
    """As `triton_forward`."""
    batch, seqlen, dim = x.shape
    y = torch.empty_like(x)
    state = initial_state.clone()
    chunks = math.ceil(seqlen / CPU_CHUNK) if save_states else 0
    chunk_states = x.new_empty(batch, chunks, A.shape[0], dim)
    pieces, memory = cut(x, A, copies=2)
    for rows, steps, chunk in pieces:
        if save_states:
            chunk_states[rows, chunk] = state[rows]
        piece = rows, steps
        _, h = scan_piece(state[rows], x[piece], dt[piece], A, B[piece], memory)
        state[rows] = h[:, -1]
        y[piece] = torch.einsum("btn,btnd->btd", C[piece], h)
    return y, state, chunk_states


def cpu_backward(x, dt, A, B, C, chunk_states, dy, dlast_state):
    """As `triton_backward`."""
    dx, ddt, dB, dC = [torch.empty_like(like) for like in (x, dt, B, C)]
    dA = torch.zeros_like(A)
    ag = torch.zeros_like(chunk_states[:, 0])                   # a_{t+1} g_{t+1}
    if dlast_state is not None:
        ag.copy_(dlast_state)
    pieces, memory = cut(x, A, copies=3)
    for rows, steps, chunk in reversed(pieces):
        piece = rows, steps
        h_before = chunk_states[rows, chunk]
        a, h = scan_piece(h_before, x[piece], dt[piece], A, B[piece], memory)
        dC[piece] = torch.einsum("btd,btnd->btn", dy[piece], h)

        g = memory[2, :h.shape[0], :h.shape[1]]
        torch.mul(C[piece].unsqueeze(3), dy[piece].unsqueeze(2), out=g)
        a_steps, g_steps = a.unbind(1), g.unbind(1)             # C_t dy_t; the loop makes it g_t
        g_steps[-1].add_(ag[rows])
        for t in range(len(g_steps) - 2, -1, -1):
            g_steps[t].addcmul_(a_steps[t + 1], g_steps[t + 1])
        dB[piece] = torch.einsum("btd,btnd->btn", x[piece], g)
        dx[piece] = torch.einsum("btn,btnd->btd", B[piece], g)

        w = a.mul_(g)                                           # a_t g_t, in the memory of a
        ag[rows] = w[:, 0]
        w[:, 1:] *= h[:, :-1]                                   # times h_{t-1}: now it is w_t
        w[:, 0] *= h_before
        scratch = g                                             # g is not needed any more
        ddt[piece] = torch.mul(A, w, out=scratch).sum(2)
        dA += torch.mul(dt[piece].unsqueeze(2), w, out=scratch).sum((0, 1))
    return dx, ddt, dA, dB, dC, ag


# Autograd, around both paths.


def one_by_one(function, info, in_dims, inputs):
    """The vmap of a function: a call for each element of the mapped dimension."""
    results = []
    for i in range(info.batch_size):
        one = [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims)]
        results.append(function(*one))
    outputs = tuple(map(torch.stack, zip(*results)))
    return outputs, (0,) * len(outputs)


class Scan(torch.autograd.Function):
    """The recurrence -> y, the last state, and the states that the backward pass needs"""

    @staticmethod
    def forward(x, dt, A, B, C, initial_state, use_triton, save_states):
        forward = triton_forward if use_triton else cpu_forward
        with torch.autocast(x.device.type, enabled=False):  # products of states keep their dtype
            return forward(x, dt, A, B, C, initial_state, save_states)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, dt, A, B, C, _, ctx.use_triton, _ = inputs
        _, _, chunk_states = output
        ctx.save_for_backward(x, dt, A, B, C, chunk_states)
        ctx.set_materialize_grads(False)  # the gradient of an output that is not used is None then

    @staticmethod
    def backward(ctx, dy, dlast_state, _):
        if dy is None:
            dy = torch.zeros_like(ctx.saved_tensors[0])
        gradients = ScanBackward.apply(*ctx.saved_tensors, dy, dlast_state, ctx.use_triton)
        return *gradients, None, None  # the two flags have none

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return one_by_one(apply_scan, info, in_dims, inputs)


class ScanBackward(torch.autograd.Function):
    """The gradients, as a function of its own, so that vmap can take them one by one, too.

    It has no backward: second derivatives raise NotImplementedError.
    """

    @staticmethod
    def forward(x, dt, A, B, C, chunk_states, dy, dlast_state, use_triton):
        backward = triton_backward if use_triton else cpu_backward
        inputs = [each.contiguous() for each in (x, dt, A, B, C, chunk_states, dy)]
        if dlast_state is not None:
            dlast_state = dlast_state.contiguous()
        with torch.autocast(x.device.type, enabled=False):
            return backward(*inputs, dlast_state)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing is saved."""

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return one_by_one(ScanBackward.apply, info, in_dims, inputs)


@torch._disable_dynamo  # torch.compiler.disable, without importing the compiler before its use
def apply_scan(x, dt, A, B, C, initial_state, use_triton, save_states=False):
    """`Scan.apply`, with states saved if a gradient is needed.

    Inside vmap no tensor shows whether it is. But `Scan.vmap` calls this again, outside.
    """
    inputs = [each.contiguous() for each in (x, dt, A, B, C, initial_state)]
    if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):
        save_states = True
    return Scan.apply(*inputs, use_triton, save_states)


# The choice. All take the same arguments and return y and the last state.


def scan_triton(x, dt, A, B, C, initial_state):
    return apply_scan(x, dt, A, B, C, initial_state, use_triton=True)[:2]


def scan_cpu(x, dt, A, B, C, initial_state):
    return apply_scan(x, dt, A, B, C, initial_state, use_triton=False)[:2]


def scan(x, dt, A, B, C, initial_state):
    """The fastest for the device and size."""
    inputs = x, dt, A, B, C, initial_state
    if x.is_cuda and triton is not None:
        return scan_triton(*inputs)
    if x.shape[1] == 1 or x.numel() * A.shape[0] < 1000:
        return scan_ref(*inputs)  # scan_cpu would cost more than it saves
    return scan_cpu(*inputs)


# The operator of Mamba: bias, softplus, skip connection and gate around the recurrence.

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def form(x):
    """What an argument is, for an error message."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return f"{x.layout} {x.dtype} {tuple(x.shape)} on {x.device}"


def check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """Raises ValueError for an argument of a form that the scan does not support."""
    for x, dims in ((u, 3), (A, 2)):
        if not isinstance(x, torch.Tensor) or x.dim() != dims or 0 in x.shape[-2:]:
            raise ValueError(
                "u must be a tensor (batch, dim, seqlen) and A (dim, dstate), where only batch "
                f"may be 0, got {form(u)} and {form(A)}"
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
        if x is None and name in ("D", "z", "delta_bias", "initial_state"):
            continue
        right = (
            isinstance(x, torch.Tensor)
            and x.layout == torch.strided
            and x.dtype in DTYPES
            and x.device == u.device
            and x.shape == shape
        )
        if not right:
            raise ValueError(
                f"{name} must be a dense real tensor {shape} on {u.device}, got {form(x)}. Complex "
                "A, and B and C that are constant or in groups, are not supported"
            )


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None,
    delta_softplus=False, return_last_state=False, initial_state=None,
):
    """All the equations at the top of this file.

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
    dtype = torch.promote_types(u.dtype, torch.float32)
    out_dtype = u.dtype
    u, dt, A, B, C = [each.to(dtype).mT for each in (u, delta, A, B, C)]  # channels last
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)
    if delta_softplus:
        dt = F.softplus(dt, threshold=40)   # 20, the default, is too coarse for float64
    if initial_state is None:
        h = u.new_zeros(u.shape[0], *A.shape)
    else:
        h = initial_state.to(dtype).mT
    y, h = scan(dt * u, dt, A, B, C, h)
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype).mT)
    out = y.to(out_dtype).mT
    return (out, h.mT) if return_last_state else out
