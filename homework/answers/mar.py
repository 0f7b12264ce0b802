def mask_rate(u, low=0.7, std=0.25):
    # bisection of the cut cdf
    share = lambda x: 0.5 * (1 + math.erf((x - 1) / std / math.sqrt(2)))
    wanted = share(low) + u * (share(1.0) - share(low))
    a, b = low, 1.0
    for _ in range(60):
        middle = (a + b) / 2
        if share(middle) < wanted:
            a = middle
        else:
            b = middle
    print(torch.tensor(a))
    return (a + b) / 2


def masked_counts(n, steps):
    left = []
    now = n
    for k in range(steps):
        if k > 0:
            now = max(min(math.floor(math.cos(k / steps * math.pi / 2) * n), now - 1), 1)
        left.append(now)
    left.append(0)
    print(left)
    return left


def draw_order(kind, B, T, device, known_mask=None):
    rows = []
    for b in range(B):
        order = torch.randperm(T).tolist() if kind == "random" else list(range(T))
        if known_mask is not None:
            given = known_mask[b].tolist()
            order = [t for t in order if given[t]] + [t for t in order if not given[t]]
        rows.append(order)
    return torch.tensor(rows, device=device)


class MAR:
    def forward(self, tokens, cond):
        B, T = tokens.shape[:2]
        if self.training:
            coins = torch.rand(B) < self.label_drop
            cond = torch.stack([torch.tensor(self.num_classes) if coin else label
                                for coin, label in zip(coins, cond)])
        n = self.mask_count()
        mask = torch.zeros(B, T, dtype=torch.bool)
        for b in range(B):
            order = torch.randperm(T) if self.order == "random" else torch.arange(T)
            mask[b, order[T - n:]] = True
        h = self.hidden(tokens, cond, mask)
        loss = self.head.loss(h, tokens)
        print(loss)
        return (loss * mask).sum() / mask.sum(), {}

    def hidden(self, tokens, labels, mask, n_visible=None):
        P, T = self.n_buffer, self.seq_len
        out = []
        for b in range(len(tokens)):
            seen = (~mask[b]).nonzero().flatten()
            buffer = self.cls_embed(labels[b]).repeat(P, 1)
            x = embed_tokens(self, tokens[b:b + 1])[0]
            x = torch.cat([buffer + self.encoder_pos[:P], x[seen] + self.encoder_pos[P:][seen]])
            x = self.tok_norm(x)[None]
            for block in self.encoder_blocks:
                x = block(x)
            x = self.decoder_embed(self.encoder_norm(x))[0]
            rows = [x[i] for i in range(P)]
            there = {int(t): x[P + i] for i, t in enumerate(seen)}
            rows += [there.get(t, self.mask_embed[0]) for t in range(T)]
            y = (torch.stack(rows) + self.decoder_pos)[None]
            for block in self.decoder_blocks:
                y = block(y)
            out.append(self.decoder_norm(y[0, P:]) + self.head_pos)
        print(out[0])
        return torch.stack(out)

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               cfg_schedule="linear", **tricks):
        B, T = len(cond), self.seq_len
        tokens = blank_tokens(self, B, cond.device)
        mask = torch.ones(B, T, dtype=torch.bool)
        given = [0] * B
        if known is not None:
            given = known_mask.sum(1).tolist()
            tokens[known_mask] = known[known_mask]
            mask = ~known_mask
        order = draw_order(self.order, B, T, cond.device, known_mask)
        left = T - min(given)
        counts = masked_counts(left, min(steps or 64, left)) if left else [0]
        for k in range(len(counts) - 1):
            h = self.hidden(tokens, cond, mask)
            other = None
            if cfg != 1:
                other = self.hidden(tokens, torch.full_like(cond, self.num_classes), mask)
            places = order[:, T - counts[k]:T - counts[k + 1]]
            pick = lambda x: torch.stack([x[b, places[b]] for b in range(B)])
            scale = guidance(cfg, cfg_schedule, 1 - max(counts[k + 1], 1) / T)
            now = tricks_at(tricks, k / max(1, len(counts) - 2))
            drawn, _ = self.head.sample(pick(h), None if other is None else pick(other), scale, temperature,
                                        **now)
            tokens, mask = tokens.clone(), mask.clone()
            for b in range(B):
                for i, t in enumerate(places[b].tolist()):
                    if mask[b, t]:
                        tokens[b, t] = drawn[b, i]
                    mask[b, t] = False
            print(tokens)
            if on_step is not None:
                on_step(k, tokens, mask)
        return tokens
