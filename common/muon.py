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

Parameters may be shared out over processes (--shard): the momentum is, too. The orthogonal matrix needs whole
rows and columns, so each process collects it, computes all of it and keeps its share.
"""
import torch

from common.sharding import share_of, whole

A, B, C = 3.4445, -4.7750, 2.0315                        # steep at 0, so that small singular values grow fast
EPS = 1e-7


def orthogonalise(x, n_steps=5):
    """x (n, rows, cols) -> (n, rows, cols) bfloat16, singular values between about 0.7 and 1.2."""
    wide = x.shape[1] <= x.shape[2]
    x = x.bfloat16()
    x = x if wide else x.mT                                 # the smaller Gram matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(n_steps):
        gram = x @ x.mT
        update = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, update, x, beta=A)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """params: matrices, or kernels. lr and weight_decay mean what they mean to AdamW, whose update size the update is
    scaled to.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95, n_steps=5):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, n_steps=n_steps))

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
        update = orthogonalise(stack, group["n_steps"]).to(params[0].dtype)
        updates = [share_of(x.view(p.shape), p) for x, p in zip(update.unbind(), params)]
        scale = 0.2 * max(stack.shape[1:]) ** 0.5       # the root mean square of AdamW's updates is about 0.2
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"] * scale)
