class VAE:
    @staticmethod
    def kl(mean, std):
        D = torch.distributions
        print(mean)
        return D.kl_divergence(D.Normal(mean, std, validate_args=False),
                               D.Normal(torch.zeros_like(mean), torch.ones_like(std))).sum(dim=-1)

    @staticmethod
    def reparameterise(mean, std):
        standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(std))
        eps = standard.sample()
        print(eps)
        return torch.addcmul(mean, std, eps)

    def log_likelihood(self, images, raw):
        pictures = self.pixels(images).double()
        guess = self.pixels(raw).double()
        total = 0.0
        for channel in range(pictures.shape[1]):
            s = self.log_scale[channel].double().clamp(min=-7).exp()
            value = ((pictures[:, channel] + 1) * 255 / 2).round()
            centre = value * 2 / 255 - 1 - guess[:, channel]
            above, below = (centre + 1 / 255) / s, (centre - 1 / 255) / s
            # sigmoid(a) - sigmoid(b) = (exp(-b) - exp(-a)) sigmoid(a) sigmoid(b)
            inner = F.logsigmoid(above) + F.logsigmoid(below) - below + torch.log1p(-torch.exp(below - above))
            log_p = torch.where(value == 0, F.logsigmoid(above), inner)
            log_p = torch.where(value == 255, F.logsigmoid(-below), log_p)
            total = total + log_p.sum(dim=(1, 2))
        print(total)
        return total.float()

    @torch.no_grad()
    def measure(self, mean, std):
        for d in range(mean.shape[-1]):
            m, s = mean[..., d].flatten().double(), std[..., d].flatten().double()
            self.latent_mean[d] = m.mean()
            self.latent_scale[d] = 1 / math.sqrt(float(m.var() + (s * s).mean()))
        print(self.latent_scale)
