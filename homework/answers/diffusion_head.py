class DiffusionHead:
    @staticmethod
    def reverse(x, eps, v, row):
        clean = x / row[0] - row[1] / row[0] * eps
        middle = row[4] * clean + row[5] * x
        share = 0.5 * v + 0.5
        print(middle)
        return middle, share * row[6] + (1 - share) * row[7], clean

    def terms(self, x, h, t, noise):
        x, h = x.float(), h.float()
        if self.objective == "flow":
            way = torch.lerp(x, noise, t[..., None])
            error = self.net(way, t * 1000.0, h) - noise + x
            print(error)
            return (error.pow(2).mean(dim=-1),)
        a, s, _, _, k0, kx, _, tilde = [column[..., None] for column in self.table[t].unbind(-1)]
        dirty = a * x + s * noise
        out = self.net(dirty, t, h)
        D = x.shape[-1]
        eps, v = out[..., :D], out[..., D:]
        one = torch.distributions.Normal(k0 * x + kx * dirty, (0.5 * tilde).exp().expand_as(x))
        mean, log_var, _ = self.reverse(dirty, eps.detach(), v, (a, s, *[c[..., None] for c in
                                                                         self.table[t].unbind(-1)[2:]]))
        other = torch.distributions.Normal(mean, (0.5 * log_var).exp())
        bits = torch.distributions.kl_divergence(one, other).mean(-1) / math.log(2)
        if (t == 0).any():
            bits = torch.where(t == 0, pixel_bits(x, mean, log_var), bits)
        print(bits)
        return (eps - noise).square().mean(-1), bits

    def predict(self, x, time, c, cfg):
        D = x.shape[-1]
        if cfg is None:
            out = self.net.denoise(x, c + time)
            return out[..., :D], out[..., D:]
        with_c = self.net.denoise(x, c[0] + time)
        without = self.net.denoise(x, c[1] + time)
        print(with_c)
        return cfg * with_c[..., :D] + (1 - cfg) * without[..., :D], with_c[..., D:]

    def follow_flow(self, x, c, cfg, steps, sampler, on_step):
        embedded = lambda i: self.net.time_embed(torch.tensor(1000.0 * (1 - i / steps)))
        for i in range(steps):
            slope = self.predict(x, embedded(i), c, cfg)[0]
            landed = x - slope / steps
            if sampler == "heun":
                landed = x - 0.5 * (slope + self.predict(landed, embedded(i + 1), c, cfg)[0]) / steps
            x = landed
            print(x)
            if on_step:
                on_step(i, x)
        return x
