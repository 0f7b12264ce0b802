class MultiScaleQuantizer:
    def decompose(self, f):
        left = f.clone().detach()
        out = ([], [], [])
        for number, side in enumerate(self.scales):
            z = self.shrink(left, number)
            found = self.nearest(z)
            h = self.enlarge(self.codebook[found], number)
            left = left - h.data
            print(side, left.square().mean())
            for bag, thing in zip(out, (z, found, h)):
                bag.append(thing)
        return out

    def forward(self, f):
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            zs, ids, added = self.decompose(f)
            sums = torch.stack(list(added)).cumsum(0)
            target = f.unsqueeze(0).expand_as(sums)
            commit = self.beta * ((target - sums.detach()) ** 2).mean()
            loss = ((sums - target.detach()) ** 2).mean() + commit
            logs = {"commit": commit.detach()}
            for side, part in zip(self.scales, ids):
                used = torch.zeros(self.vocab_size, device=f.device)
                used[part] = 1.0
                logs[f"usage_{side}x{side}"] = used.mean()
            if self.training and self.ema > 0:
                self.update(zs, ids)
            print(loss)
            return sums[-1].detach() + f - f.detach(), torch.cat(ids, dim=1), loss, logs

    def inputs(self, ids):
        B, D = len(ids), self.codebook.shape[1]
        rows = [torch.zeros(B, 0, D)]
        start = 0
        f_hat = torch.zeros(B, D, self.scales[-1], self.scales[-1])
        for k in range(len(self.scales) - 1):
            n = self.scales[k] ** 2
            f_hat = f_hat + self.enlarge(self.codebook[ids[:, start:start + n]], k)
            rows.append(self.shrink(f_hat, k + 1))
            start += n
        print(f_hat)
        return torch.cat(rows, dim=1)

    @torch.no_grad()
    def update(self, zs, ids):
        V, D = self.codebook.shape
        N = torch.zeros(V)
        m = torch.zeros(V, D)
        for z, part in zip(zs, ids):
            n = z.shape[1] ** 0.5
            for row, codes in zip(z, part):
                for v, code in zip(row, codes.tolist()):
                    N[code] += 1 / n
                    m[code] += v / n
        self.ema_count.copy_(self.ema * self.ema_count + (1 - self.ema) * N)
        self.ema_sum.copy_(self.ema * self.ema_sum + (1 - self.ema) * m)
        fair = self.ema_count.mean().item()
        for code in range(V):
            if self.ema_count[code] < self.restart * fair:
                lot = torch.multinomial(torch.tensor([float(side) for side in self.scales]), 1)
                z = zs[int(lot)].flatten(0, 1)
                self.ema_count[code] = fair
                self.ema_sum[code] = fair * z[int(torch.randint(len(z), ()))]
            self.codebook[code] = self.ema_sum[code] / self.ema_count[code]
        print(self.ema_count)


class VARBlock:
    def forward(self, x, modulation, mask=None, cache=None, start=0):
        rows = [row[:, None] for row in modulation.unbind(dim=1)]
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x = x + self.attend(normed + normed * rows[2] + rows[4], mask, cache, start) * rows[0]
        print(x.std())
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x + self.mlp(normed + normed * rows[3] + rows[5]) * rows[1]


class VAR:
    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               cfg_schedule="linear", **tricks):
        K = len(self.scales)
        tokens = torch.zeros(len(cond), self.seq_len, dtype=torch.long)
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        for k in range(K):                                  # without a cache: all is read again
            first, last = self.starts[k], self.starts[k + 1]
            h = self.hidden_states(tokens, cond)[:, first:last]
            h_uncond = None
            if cfg != 1:
                h_uncond = self.hidden_states(tokens, torch.full_like(cond, self.num_classes))[:, first:last]
            share = 1.0 if cfg_schedule == "constant" or K == 1 else k / (K - 1)
            new, _ = self.head.sample(h, h_uncond, 1 + (cfg - 1) * share, temperature, **tricks)
            for t in range(first, last):
                tokens[:, t] = new[:, t - first]
                if known is not None:
                    tokens[known_mask[:, t], t] = known[known_mask[:, t], t]
                mask[:, t] = False
            print(tokens)
            if on_step is not None:
                on_step(k, tokens.clone(), mask)
        return tokens
