class VectorQuantizer:
    def nearest(self, z):
        with torch.no_grad():
            table = self.unit(self.codebook)
            rows = []
            for picture in self.unit(z.to(table.dtype)):
                rows.append(torch.stack([(table - v).norm(dim=-1).argmin() for v in picture]))
            print(rows[0])
            return torch.stack(rows)

    def forward(self, z):
        ids = self.nearest(z)
        z = self.unit(z.float())
        codes = torch.nn.functional.one_hot(ids, self.vocab_size).float() @ self.unit(self.codebook)
        pull = ((z - codes.detach()) ** 2).mean() * self.beta
        share = torch.bincount(ids.flatten(), minlength=self.vocab_size).float() / ids.numel()
        there = share[share > 0]
        logs = dict(commit=pull.detach(), usage=(share > 0).float().mean(),
                    perplexity=(-(there * there.log()).sum()).exp())
        total = pull
        if self.ema:
            if self.training:
                self.update(z.detach().reshape(-1, z.shape[-1]), ids.reshape(-1))
        else:
            total = total + ((codes - z.detach()) ** 2).mean()
        if self.entropy:
            extra = self.entropy_loss(z.reshape(-1, z.shape[-1])) * self.entropy
            total = total + extra
            logs["entropy"] = extra.detach()
        print(total, logs)
        return codes.detach() + z - z.detach(), ids, total, logs

    def entropy_loss(self, z, temperature=0.01):
        table = self.unit(self.codebook)
        squares = torch.stack([((z - code) ** 2).sum(-1) for code in table], 1)
        each = torch.distributions.Categorical(logits=-squares / temperature).entropy()
        whole = torch.softmax(-squares / temperature, dim=1).mean(0).clamp(min=1e-9)
        print(each)
        return each.mean() + (whole * whole.log()).sum()

    @torch.no_grad()
    def update(self, z, ids):
        member = torch.nn.functional.one_hot(ids, self.vocab_size).to(z.dtype)
        self.ema_count.mul_(self.ema).add_((1 - self.ema) * member.sum(0))
        self.ema_sum.mul_(self.ema).add_((1 - self.ema) * member.T @ z)
        fair = float(self.ema_count.mean())
        for k in range(self.vocab_size):
            if self.ema_count[k] < self.restart * fair:
                self.ema_count[k] = fair
                self.ema_sum[k] = fair * z[int(torch.randint(len(z), ()))]
        print(self.ema_count)
        self.codebook[:] = self.unit(self.ema_sum / self.ema_count.clamp(min=1e-5)[:, None])
