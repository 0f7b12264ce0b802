"""
Muon for the matrices inside transformer blocks and the kernels of convolutions, with all of equal shape in
one stack.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
matrix with orthonormal rows, so that every direction is learnt at the same speed. A Newton-Schulz iteration
finds it nearly:

    x <- a x + (b x x^T + c (x x^T)^2) x          brings every singular value of x near 1

The numbers are those of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), which treats one matrix after the
other: 23 small kernels for each. A GPU spends most of that time on launches. Here there are 23 for each
shape.

A kernel (c_out, c_in, k, k) counts as the matrix (c_out, c_in * k * k), as in the post above.

With `rows`, a matrix of a transformer is cut along its longer side into blocks of so many rows, which count
as matrices of their own: for wqkv about one per head. That takes a fifth of the multiplications. On the
default run a step learns as much as with whole matrices, and the validation loss after equal processor time
is lower. MaskGIT learns more in a step from whole ones (both: docs/results.md).

Parameters may be shared out over processes (--shard): the momentum is, too. The orthogonal matrix needs whole
rows and columns, so each process collects it, computes all of it and keeps its share.
"""
import torch

from common.sharding import share_of, whole

# (a, b, c) of each iteration, by how many there are: steep at 0, so that small singular values grow fast.
COEFFICIENTS = {
    5: 5 * [(3.4445, -4.7750, 2.0315)],                     # of the post
    # Each iteration brings all singular values as near to 1 as it can, from 0.01 .. 1 at first (the idea of
    # Polar Express, Amsel et al. 2025): 0.73 .. 1.27 after three.
    3: [(8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)],
}
ROWS = 64                                                   # of a block, in train.py
EPS = 1e-7


def orthogonalise(x, n_steps=5, dtype=torch.bfloat16):
    """x (n, rows, cols) -> (n, rows, cols) in dtype, singular values between about 0.7 and 1.3."""
    wide = x.shape[1] <= x.shape[2]
    x = x.to(dtype)
    x = x if wide else x.mT                                 # the smaller Gram matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for a, b, c in COEFFICIENTS[n_steps]:
        gram = x @ x.mT
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """params: matrices, or kernels. lr and weight_decay mean what they mean to AdamW, whose update size the
    update is scaled to. rows: of the blocks that matrices, not kernels, are cut into, with three iterations;
    those whose longer side it does not divide stay whole. dtype: of the iterations. bfloat16 is enough, but a
    CPU that does not multiply it natively takes 9 to 18 times as long as in float32.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95, n_steps=5, rows=None, dtype=torch.bfloat16):
        self.dtype = dtype                                  # of this machine: no checkpoint keeps it
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, n_steps=n_steps,
                                      rows=rows))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.update(params, group)

    def update(self, params, group):
        """One step for parameters of equal shape (rows, cols) or (c_out, c_in, k, k)."""
        grads = [p.grad for p in params]
        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
        stack = torch.stack([whole(x).flatten(1) for x in nesterov])                  # (n, rows, cols)
        tall = stack if stack.shape[1] >= stack.shape[2] else stack.mT
        rows = group.get("rows")                            # older checkpoints have none
        n_steps = 3
        if not rows or params[0].ndim > 2 or tall.shape[1] % rows:
            rows = tall.shape[1]                            # whole
            n_steps = group["n_steps"]
        blocks = tall.reshape(-1, rows, tall.shape[2])
        update = orthogonalise(blocks, n_steps, self.dtype).to(params[0].dtype).reshape(tall.shape)
        update = update if tall is stack else update.mT
        updates = [share_of(x.reshape(p.shape), p) for x, p in zip(update.unbind(), params)]
        scale = 0.2 * max(blocks.shape[1:]) ** 0.5      # the root mean square of AdamW's updates is about 0.2
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"] * scale)
