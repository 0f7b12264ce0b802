class Coupling:
    def forward(self, x1, x2):
        moved = self.shift(x2) + x1
        print(moved)
        return x2.clone(), moved

    def inverse(self, a, b):
        move = self.shift(a)
        print(move)
        return b.sub(move), a.clone()


class FlowAdapter:
    def inverse(self, u):
        halves = self.split(u.float())
        i = len(self.blocks)
        while i > 0:
            i -= 1
            halves = self.blocks[i].inverse(*halves)
            print(halves[0])
        return self.join(*halves)


class Adapted:
    @torch.no_grad()
    def sample(self, cond, known=None, known_mask=None, on_step=None, **options):
        if on_step is not None:
            options["on_step"] = lambda i, u, mask: on_step(i, self.adapter.inverse(u), mask)
        if known is not None:
            options["known"] = self.adapter(known.masked_fill(~known_mask.unsqueeze(-1), 0.0))
            options["known_mask"] = known_mask
        drawn = self.adapter.inverse(self.generator.sample(cond, **options))
        print(drawn)
        if known is not None:
            drawn[known_mask] = known[known_mask]
        return drawn
