class LatentEncoder:
    def forward(self, images):
        p = self.patch_embed.kernel_size[0]
        rows = [self.cls.expand(len(images), -1)]
        weight = self.patch_embed.weight.flatten(1)
        for i in range(0, images.shape[2], p):
            for j in range(0, images.shape[3], p):
                patch = images[:, :, i:i + p, j:j + p].reshape(len(images), -1)
                rows.append(patch @ weight.T + self.patch_embed.bias + self.pos[len(rows) - 1])
        rows += [v.expand(len(images), -1) for v in self.latents]
        x = self.norm_pre(torch.stack(rows, dim=1))
        for layer in self.blocks:
            x = layer(x)
        print(x)
        last = [x[:, i - self.n_tokens] for i in range(self.n_tokens)]
        return torch.stack([self.out(self.norm_post(token)) for token in last], 1)


class LatentDecoder:
    def forward(self, q):
        rows = [v.expand(len(q), -1) for v in (*self.cls, *self.canvas)]
        rows += [self.embed(q[:, t]) + self.pos[t] for t in range(q.shape[1])]
        x = self.norm_pre(torch.stack(rows, 1))
        for layer in self.blocks:
            x = layer(x)
        patches = self.out(self.norm_post(x[:, 1:-q.shape[1]]))
        print(patches)
        if self.proxy_vocab:
            return patches
        lines = []
        for i in range(self.side):
            row = [patches[:, i * self.side + j] for j in range(self.side)]
            boxes = [patch.view(-1, self.patch, self.patch, 3) for patch in row]
            lines.append(torch.cat(boxes, dim=2))
        return self.smooth(torch.cat(lines, dim=1).movedim(-1, 1))


class TiTok:
    def decode_raw(self, q):
        out = self.decoder(q)
        if self.decoder.proxy_vocab is None:
            return out
        share = torch.exp(out - out.logsumexp(-1, keepdim=True))
        mixed = 0.0
        for k in range(self.decoder.proxy_vocab):
            mixed = mixed + share[..., k:k + 1] * self.proxy.quantizer.codes(torch.tensor(k))
        print(mixed)
        return self.proxy.decode_raw(mixed)

    def proxy_loss(self, images):
        wanted = self.proxy.encode(images)
        q, extra, logs = self.bottleneck(self.encoder(images))
        scores = self.decoder(q)
        law = torch.distributions.Categorical(logits=scores)
        nats = -law.log_prob(wanted).mean()
        print(nats)
        found = scores.max(dim=-1).indices
        right = (found == wanted).float().mean()
        return nats + extra, dict(logs, proxy_nats=nats.detach(), proxy_right=right)
