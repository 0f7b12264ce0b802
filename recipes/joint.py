"""VAE and generator trained together by the exact bound on log p(image)."""
import math

import torch.nn as nn


def bound(vae, generator, images, cond):
    """The bits per dimension (pixel value) that VAE and generator need at most -> loss (), logs of its terms.

        -log p(image | c)  <=  E[ -log p(image | z) ]  +  E[ -log p(z | c) ]  -  H( q(z | image) ),   z ~ q

    The prior is the generator, whose forward gives -log p(tokens | c) in nats per token, exactly, so it must
    be autoregressive with a density head. The vae has likelihood="logistic". With N(0, 1) in the prior's
    place this is -log p(image | z) + KL, the VAE's own bound. It holds however the two were trained. A
    sharper q is paid for by H, so that nothing is gained by shrinking std. One draw of z per image; images
    are never corrupted here.
    """
    if vae.likelihood != "logistic" or vae.beta == 0:
        raise ValueError('a bound on the likelihood needs VAE(likelihood="logistic") and a beta above 0')
    mean, std = vae.posterior(images)
    z = vae.reparameterise(mean, std)                                                 # (B, T, D)
    T = vae.seq_len
    dims = math.log(2) * vae.pixels(images)[0].numel()                            # nats -> bits per dimension
    pixels = -vae.log_likelihood(images, vae.decode_raw(z)).mean()                    # nats per image
    # The generator's density is one of normalised tokens: p(z) = p(tokens) * prod(latent_scale), T times.
    prior = T * (generator(vae.normalise(z), cond)[0] - vae.latent_scale.log().sum())
    entropy = T * (std.log() + 0.5 * math.log(2 * math.pi * math.e)).mean((0, 1)).sum()
    logs = {"pixels": pixels / dims, "prior": prior / dims, "entropy": entropy / dims}
    loss = logs["pixels"] + logs["prior"] - logs["entropy"]
    return loss, {k: v.detach() for k, v in logs.items()}


class Joint(nn.Module):
    """VAE and generator as one model: z has no N(0, 1) to obey, only a generator to suit.

    GIVT (arxiv.org/abs/2312.02116) trains them in turn and leaves this to future work. Call vae.measure()
    before training or never: afterwards the generator would meet tokens that it does not know. beta and
    corrupt of the VAE play no part.
    """

    def __init__(self, vae, generator):
        super().__init__()
        self.vae = vae
        self.generator = generator

    def forward(self, images, cond):
        """images (B, 3, H, W), cond (B,) -> loss in bits per dimension (), logs: its three terms."""
        return bound(self.vae, self.generator, images, cond)
