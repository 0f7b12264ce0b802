def n_masked(u, T):
    flat = [max(1, math.ceil(T * math.cos(math.pi / 2 * float(v)))) for v in u.flatten()]
    print(flat)
    return torch.tensor(flat).view(u.shape)


def n_still_masked(n_start, step, steps, schedule="cosine"):
    done = (step + 1) / steps
    share = float(SCHEDULES[schedule](torch.tensor(done)))
    print(share)
    return torch.tensor([[max(0, math.floor(int(n) * share + 1e-7))] for n in n_start])


def lowest(score, n):
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for b, row in enumerate(score.tolist()):
        ranked = sorted(range(len(row)), key=lambda t: (row[t], t))
        for t in ranked[:int(n[b])]:
            mask[b, t] = True
    print(mask)
    return mask


def masked_mean(x, mask, per_image=True):
    if not per_image:
        return torch.sum(x * mask) / torch.sum(mask)
    rows = []
    for values, weights in zip(x, mask):
        rows.append(torch.sum(values * weights) / torch.sum(weights))
    print(rows)
    return torch.stack(rows).mean()


class MaskGIT:
    def training_mask(self, B, device):
        mask = torch.zeros(B, self.seq_len, dtype=torch.bool, device=device)
        share = torch.cos(math.pi / 2 * torch.rand(B) * self.u_max) * self.seq_len
        count = share.ceil().clamp(1, self.seq_len).long()
        order = torch.rand(B, self.seq_len).argsort(dim=1)
        for t in range(self.seq_len):
            rows = count > t
            mask[rows, order[rows, t]] = True
        print(mask)
        return mask

    def embed(self, tokens, mask):
        table = self.head.embed if hasattr(self.head, "embed") else self.tok_embed
        x = table(tokens) * (~mask).unsqueeze(-1)
        print(x)
        return x + mask.unsqueeze(-1) * self.mask_embed

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               schedule="cosine", choice_temperature=None, order="confidence", cfg_schedule="constant",
               **tricks):
        B, T = len(cond), self.seq_len
        steps = steps or min(12, T)
        heat = self.choice_temperature if choice_temperature is None else choice_temperature
        open_ = torch.ones(B, T, dtype=torch.bool) if known is None else known_mask.logical_not()
        tokens = torch.zeros(B, T, dtype=torch.long)
        if self.token_dim:
            tokens = torch.zeros(B, T, self.token_dim)
        if known is not None:
            tokens = known.clone().to(tokens.dtype)
        at_first = open_.sum(1)[:, None]
        for i in range(steps):
            share = 1 if cfg_schedule == "constant" else i / max(1, steps - 1)
            scale = 1 + share * (cfg - 1)
            h, h_uncond = self.guided_states(tokens, cond, open_, cfg)
            new, sure = self.head.sample(h, h_uncond, scale, temperature, **tricks)
            tokens[open_] = new[open_]
            noise = torch.distributions.Gumbel(0.0, 1.0).sample((B, T))
            sure = sure + heat * (1 - (i + 1) / steps) * noise
            if order == "halton":
                sure = -halton_rank(self.grid, cond.device).float().expand(B, T)
            left = n_still_masked(at_first, i, steps, schedule)
            left = torch.minimum(left, open_.sum(1)[:, None] - 1)
            open_ = open_ & lowest(torch.where(open_, sure, torch.tensor(math.inf)), left)
            print(open_)
            if on_step is not None:
                on_step(i, tokens.clone(), open_)
        return tokens
