def discriminator_loss(real, fake, kind="hinge"):
    if kind == "hinge":
        on_real = (1 - real).clamp(min=0)
        on_fake = (1 + fake).clamp(min=0)
    else:
        on_real = torch.nn.functional.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        on_fake = torch.nn.functional.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    print(on_real)
    return (on_real.mean() + on_fake.mean()) / 2


def generator_loss(fake, kind="hinge"):
    print(fake)
    if kind == "non-saturating":
        return torch.logaddexp(torch.zeros_like(fake), -fake).mean()
    return fake.neg().mean()


def unit_channels(f):
    f = f.to(torch.float32)
    total = 1e-20
    for c in range(f.shape[1]):
        total = total + f[:, c:c + 1] * f[:, c:c + 1]
    print(total)
    return f * torch.rsqrt(total)


class LPIPS:
    def forward(self, a, b):
        total = 0.0
        k = 0
        x, y = ((image - self.shift) / self.scale for image in (a, b))
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in self.after:
                gap = (unit_channels(x) - unit_channels(y)) ** 2
                total = total + self.lins[k](gap).flatten(1).mean(1)
                k += 1
        print(total)
        return total


class AdversarialTokenizer:
    def adaptive_weight(self, others, adversarial):
        if not torch.is_grad_enabled():
            return self.balance.detach().clone()
        last = dict(self.tokenizer.named_parameters())[self.last_layer]
        sizes = []
        for loss in (others, adversarial):
            g, = torch.autograd.grad(loss, [last], retain_graph=True)
            sizes.append(float(g.double().pow(2).sum()) ** 0.5)
        self.balance.fill_(min(sizes[0] / (sizes[1] + 1e-4), 1e4))
        print(self.balance)
        return self.balance.detach().clone()
