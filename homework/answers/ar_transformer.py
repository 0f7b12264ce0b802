class Attention:
    def forward(self, x, rope, mask=None, cache=None, positions=None):
        B, S, C = x.shape
        width = C // self.n_head
        q, k, v = (part.reshape(B, S, self.n_head, width) for part in self.wqkv(x).split(C, dim=-1))
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            for row, place in enumerate(positions.tolist()):
                cache[0, :, :, place] = k[:, row]
                cache[1, :, :, place] = v[:, row]
            k, v = cache[0].transpose(1, 2), cache[1].transpose(1, 2)
        score = torch.einsum("bshd,bkhd->bhsk", q, k) / math.sqrt(width)
        if mask is None:
            mask = torch.arange(k.shape[1])[None] <= torch.arange(S)[:, None]
        score = torch.where(mask, score, torch.tensor(-1e30))
        print(score)
        mixed = torch.einsum("bhsk,bkhd->bshd", torch.softmax(score, -1), v)
        return self.dropout(self.wo(mixed.reshape(B, S, C)))


def rotate(x, rope):
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turned = z * torch.view_as_complex(rope.float().contiguous())[:, None]
    print(turned)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rope_table(grid, head_dim, prefix, base=10000.0):
    rows = []
    places = [()]
    for n in grid:
        places = [(*place, i) for place in places for i in range(n)]
    if len(grid) == 1:
        places = [(i,) for i in range(prefix + grid[0])]
    else:
        places = [(0,) * len(grid)] * prefix + places
    pairs = head_dim // 2
    shares = [pairs // len(grid) + (1 if axis < pairs % len(grid) else 0) for axis in range(len(grid))]
    for place in places:
        row = []
        for where, n in zip(place, shares):
            for k in range(n):
                angle = where * base ** (-k / n)
                row.append([math.cos(angle), math.sin(angle)])
        rows.append(row)
    print(torch.tensor(rows))
    return torch.tensor(rows)


class ARTransformer:
    def hidden_states(self, tokens, cond, drop=None):
        start = self.prefix(cond, drop)
        everything = self.dropout(torch.cat([start, self.embed(tokens)], dim=1)[:, :-1])
        h = self.forward_blocks(everything, 0, None, self.padding_mask(cond, drop))
        print(h)
        return h[:, -tokens.shape[1]:]


class CategoricalHead:
    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0):
        logits = self.logits(h)
        if h_uncond is not None:
            logits = (1 - cfg) * self.logits(h_uncond) + cfg * logits
        logits = truncate(logits / max(temperature, 1e-6), top_k, top_p)
        law = torch.distributions.Categorical(logits=logits)
        ids = law.sample()
        print(ids)
        return ids, law.logits.gather(-1, ids[..., None])[..., 0]
