"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2) and its gradient.

At its heart is one recurrence. Its gradient is derived here once and written twice, line by line
with the same names: in PyTorch for a CPU, which is the easier to read, and as Triton kernels for a
GPU. `selective_scan`, at the end, puts the other equations around it.

The equations hold for one sequence and one channel. The state h has N numbers, and so have A, B_t,
C_t and a_t. All channels share B_t and C_t. u_t, dt_t, x_t and y_t are one number each. Products
are elementwise, and <,> is the sum over the N numbers.

    dt_t = softplus(delta_t + delta_bias)   how long the token acts (Delta)
    x_t = dt_t u_t                          how much it writes, in the direction B_t
    a_t = exp(dt_t A)                       how much of the state is kept (A-bar)
    h_t = a_t h_{t-1} + B_t x_t             the recurrence (equation 2a)
    y_t = <C_t, h_t>                        what is read from the state (equation 2b)
    out_t = (y_t + D u_t) silu(z_t)         the skip connection and the gate

In the paper's equation 4 a longer factor multiplies B_t. Mamba's code takes dt_t, the first term of
its series (Euler's rule), and so does this file.

The gradient of the recurrence treats x and dt as inputs of their own, because autograd does the
rest. Let dX be the gradient of the loss with respect to X, and g_t that with respect to h_t. The
loss depends on h_t through y_t and through h_{t+1}, so

    g_t = C_t dy_t + a_{t+1} g_{t+1}        the recurrence again, run from right to left
    dx_t = <B_t, g_t>
    dB_t = sum_channels g_t x_t             dC_t = sum_channels h_t dy_t
    w_t = a_t g_t h_{t-1}                   the gradient with respect to the exponent dt_t A
    ddt_t = <A, w_t>                        dA = sum_{b,t} dt_t w_t
    dh_0 = a_1 g_1

where the gradient of the last state stands in for a_{t+1} g_{t+1} at the last step, and the sum
over b is over the sequences of the batch.

The gradient needs every h_t, but all of them together would take N times the memory of x. So the
forward functions save only the state before each chunk of CHUNK steps. The backward ones take the
chunks from right to left, and compute the states of a chunk again when they get there.

These functions take and return contiguous tensors of one dtype. Channels come last, because then
neighbouring channels lie side by side in memory, as the threads of a GPU and the vector
instructions of a CPU want them:

    x, dt, y        (batch, seqlen, dim)
    A               (dstate, dim)
    B, C            (batch, seqlen, dstate)
    a state         (batch, dstate, dim)
    chunk_states    (batch, chunks, dstate, dim)
"""
import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton, so the scan runs in PyTorch there
    triton = None

CHUNK = 8  # few steps, because the backward functions hold all states of a chunk


# ---- The recurrence and its gradient in PyTorch

GROUP_SIZE = 1 << 16  # numbers in the states of a group, for each thread: they stay in the cache


def groups(x, A):
    """-> slices of the batch: groups of sequences that are worked on together"""
    batch = x.shape[0]
    size = max(1, GROUP_SIZE * torch.get_num_threads() // A.numel())
    return [slice(row, row + size) for row in range(0, batch, size)]


def by_channel(x):
    """x (rows, seqlen, dim) -> x_t (rows, 1, dim) for each t, which fits a state"""
    return x.unsqueeze(2).unbind(1)


def by_state(B):
    """B (rows, seqlen, dstate) -> B_t (rows, dstate, 1) for each t, which fits a state"""
    return B.unsqueeze(3).unbind(1)


# Each group allocates its memory once, and all steps write into it (`out=`), because allocating in
# every step can take as long as the arithmetic.


def cpu_forward(x, dt, A, B, C, initial_state):
    """-> y, the last state, and the state before each chunk"""
    batch, seqlen, dim = x.shape
    y = torch.empty_like(x)
    last_state = initial_state.clone()
    chunk_states = x.new_empty(batch, math.ceil(seqlen / CHUNK), *A.shape)
    for rows in groups(x, A):
        x_, dt_, y_ = by_channel(x[rows]), by_channel(dt[rows]), by_channel(y[rows])
        B_, C_ = by_state(B[rows]), by_state(C[rows])
        h = last_state[rows]                                    # each step changes it in place
        a, product = torch.empty_like(h), torch.empty_like(h)
        for t in range(seqlen):
            if t % CHUNK == 0:
                chunk_states[rows, t // CHUNK] = h
            torch.mul(dt_[t], A, out=a).exp_()
            h.mul_(a).addcmul_(B_[t], x_[t])
            torch.mul(C_[t], h, out=product)
            torch.sum(product, 1, keepdim=True, out=y_[t])
    return y, last_state, chunk_states


def cpu_backward(x, dt, A, B, C, chunk_states, dy, dlast_state):
    """-> the gradients of x, dt, A, B, C and the initial state"""
    seqlen = x.shape[1]
    dx, ddt, dB, dC = [torch.empty_like(each) for each in (x, dt, B, C)]
    dA = torch.zeros_like(A)
    dinitial_state = dlast_state.clone()
    for rows in groups(x, A):
        x_, dt_, dy_ = by_channel(x[rows]), by_channel(dt[rows]), by_channel(dy[rows])
        dx_, ddt_ = by_channel(dx[rows]), by_channel(ddt[rows])
        B_, C_, dB_, dC_ = [by_state(each[rows]) for each in (B, C, dB, dC)]
        ag = dinitial_state[rows]                               # a_{t+1} g_{t+1}, in place
        dA_sum = torch.zeros_like(ag)
        a = ag.new_empty(CHUNK, *ag.shape).unbind()             # a[i] of step i of a chunk
        h = ag.new_empty(CHUNK + 1, *ag.shape).unbind()         # h[i] is the state before step i
        w, product = torch.empty_like(ag), torch.empty_like(ag)
        for k in reversed(range(chunk_states.shape[1])):
            chunk = range(k * CHUNK, min((k + 1) * CHUNK, seqlen))
            h[0].copy_(chunk_states[rows, k])
            for i, t in enumerate(chunk):                       # its states again
                torch.mul(dt_[t], A, out=a[i]).exp_()
                torch.mul(a[i], h[i], out=h[i + 1]).addcmul_(B_[t], x_[t])

            for i, t in reversed(list(enumerate(chunk))):
                g = ag.addcmul_(C_[t], dy_[t])
                torch.mul(B_[t], g, out=product)
                torch.sum(product, 1, keepdim=True, out=dx_[t])
                torch.mul(g, x_[t], out=product)
                torch.sum(product, 2, keepdim=True, out=dB_[t])
                torch.mul(h[i + 1], dy_[t], out=product)
                torch.sum(product, 2, keepdim=True, out=dC_[t])
                ag = g.mul_(a[i])
                torch.mul(ag, h[i], out=w)
                dA_sum.addcmul_(dt_[t], w)
                torch.mul(A, w, out=product)
                torch.sum(product, 1, keepdim=True, out=ddt_[t])
        dA += dA_sum.sum(0)
    return dx, ddt, dA, dB, dC, dinitial_state


# ---- The same in Triton

BLOCK_D = 32      # channels of a program: one for each thread of a warp
NUM_WARPS = 1     # of a program

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)  # a GPU computes powers of 2: e^x = 2^(x log2(e))

    # Many programs run a kernel at once. Each works on one sequence and BLOCK_D of its channels. A
    # state is a tile (BLOCK_N, BLOCK_D), x_t and dt_t are (1, BLOCK_D), B_t and C_t (BLOCK_N, 1).
    # td, tn and nd are the offsets of such tiles in memory, with 64 bits. Loads beyond the edges
    # give 0. That is safe, because with dt = x = 0 the factor a is 1, and the state stays as it is.
    #
    # The kernels do not specialize `dim`, because the compiler, if it knew that dim is a multiple
    # of 16, would spread the states of one channel over several threads. Each sum over n would then
    # need shuffles between threads.

    @triton.jit(do_not_specialize=["dim"])
    def forward_kernel(
        x, dt, A, B, C, initial_state,
        y, last_state, chunk_states,
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
        x, dt, A, B, C, chunk_states, dy, dlast_state,
        dx, ddt, dA, dB, dC, dinitial_state,
        dim, seqlen, dstate,
        CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        block = b * tl.num_programs(1) + tl.program_id(1)       # the number of this program
        d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        n = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
        in_d = d < dim
        in_n = n < dstate
        in_nd = in_n & in_d
        nd = n * dim + d

        A_nd = tl.load(A + nd, in_nd, 0.0)
        ag = tl.load(dlast_state + b * dstate * dim + nd, in_nd, 0.0)   # a_{t+1} g_{t+1}
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


def launch(kernel, tensors, x, A):
    """Starts one program for each sequence and each block of channels."""
    batch, seqlen, dim = x.shape
    dstate = A.shape[0]
    with torch.cuda.device_of(x):                               # Triton uses the current device
        kernel[batch, triton.cdiv(dim, BLOCK_D)](
            *tensors, dim, seqlen, dstate, CHUNK=CHUNK,
            BLOCK_N=triton.next_power_of_2(dstate), BLOCK_D=BLOCK_D, num_warps=NUM_WARPS
        )


def triton_forward(x, dt, A, B, C, initial_state):
    """As `cpu_forward`."""
    batch, seqlen, dim = x.shape
    y = torch.empty_like(x)
    last_state = torch.empty_like(initial_state)
    chunk_states = x.new_empty(batch, triton.cdiv(seqlen, CHUNK), *A.shape)
    launch(forward_kernel, [x, dt, A, B, C, initial_state, y, last_state, chunk_states], x, A)
    return y, last_state, chunk_states


def triton_backward(x, dt, A, B, C, chunk_states, dy, dlast_state):
    """As `cpu_backward`."""
    batch, seqlen, dim = x.shape
    dstate = A.shape[0]
    dx = torch.empty_like(x)
    ddt = torch.empty_like(dt)
    dA = A.new_empty(batch, dstate, dim)
    dB = B.new_empty(batch, triton.cdiv(dim, BLOCK_D), seqlen, dstate)
    dC = torch.empty_like(dB)
    dinitial_state = torch.empty_like(dlast_state)
    tensors = [x, dt, A, B, C, chunk_states, dy, dlast_state]
    tensors += [dx, ddt, dA, dB, dC, dinitial_state]
    launch(backward_kernel, tensors, x, A)
    return dx, ddt, dA.sum(0), dB.sum(1), dC.sum(1), dinitial_state


# ---- Autograd, and the choice between the two


def use_triton(x):
    return x.is_cuda and triton is not None


class Scan(torch.autograd.Function):
    """The recurrence -> y and the last state. It has no second derivatives."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, initial_state):
        forward = triton_forward if use_triton(x) else cpu_forward
        x, dt, A, B, C, initial_state = [
            each.contiguous() for each in (x, dt, A, B, C, initial_state)
        ]
        y, last_state, chunk_states = forward(x, dt, A, B, C, initial_state)
        ctx.save_for_backward(x, dt, A, B, C, chunk_states)
        return y, last_state

    @staticmethod
    def backward(ctx, dy, dlast_state):
        if torch.is_grad_enabled():  # asked for by create_graph=True
            raise RuntimeError("the scan has no second derivatives")
        backward = triton_backward if use_triton(dy) else cpu_backward
        return backward(*ctx.saved_tensors, dy.contiguous(), dlast_state.contiguous())


def exportable(x, dt, A, B, C, initial_state):
    """-> y and the last state, by steps that autograd knows, because torch.export needs them"""
    h = initial_state
    y = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, None] * A) * h + B[:, t, :, None] * x[:, t, None]
        y.append((C[:, t, :, None] * h).sum(1))
    return torch.stack(y, dim=1), h


@torch._disable_dynamo  # torch.compiler.disable, without importing the compiler before its use
def scan(x, dt, A, B, C, initial_state):
    if torch.compiler.is_exporting():
        return exportable(x, dt, A, B, C, initial_state)
    return Scan.apply(x, dt, A, B, C, initial_state)


# ---- The operator of Mamba: bias, softplus, skip connection and gate around the recurrence


def check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """Raises ValueError for a wrong shape, device or dtype, because the kernels read raw memory."""
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            "u must be (batch, dim, seqlen) and A (dim, dstate), got "
            f"{tuple(u.shape)} and {tuple(A.shape)}"
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
        if x.shape != shape or x.device != u.device or not x.is_floating_point():
            raise ValueError(
                f"{name} must be a real tensor {shape} on {u.device}, got {x.dtype} "
                f"{tuple(x.shape)} on {x.device}"
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
