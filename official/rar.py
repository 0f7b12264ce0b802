"""
The authors' weights of RAR (bytedance/1d-tokenizer): a GPT on MaskGIT's VQGAN, trained with annealed orders.

    generator = load_generator("rar_b.bin")                      # RAR, in eval mode
    ids = generator.sample(torch.tensor([207]))                  # (1, 256), in raster order
    vqgan = official.titok.load_maskgit_vqgan("maskgit-vqgan-imagenet-f16-256.bin")
    images = vqgan.decode(ids)

Its orders are mar.annealed_order, and the embedding of the next position is mar.CausalMAR's pos_ahead. What
only this release needs is here: blocks modulated by the class and by the position in the sequence, normalised
queries and keys, two prefix rows, guidance that grows from token to token. (Yu et al. 2024,
arxiv.org/abs/2411.00776)

Shapes:  B batch, N tokens, V codes, C width, S = 2 + N rows: a learned one, the class, the tokens
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from official.files import load_weights


class RARBlock(nn.Module):
    """A pre-norm block whose scales, shifts and gates are read off c: x, c (B, S, C) -> (B, S, C)."""

    def __init__(self, n_embd, n_head, n_mlp):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(n_embd, eps=1e-6)
        self.attn = nn.ModuleDict(dict(
            qkv=nn.Linear(n_embd, 3 * n_embd), proj=nn.Linear(n_embd, n_embd),
            q_norm=nn.LayerNorm(n_embd // n_head), k_norm=nn.LayerNorm(n_embd // n_head)))
        self.norm2 = nn.LayerNorm(n_embd, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(n_embd, n_mlp), fc2=nn.Linear(n_mlp, n_embd)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(n_embd, 6 * n_embd))

    def attend(self, x, cache):
        """cache: [] or [keys, values] of the rows before x, to which those of x are added; None: no cache."""
        B, S, C = x.shape
        q, k, v = self.attn["qkv"](x).view(B, S, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q = self.attn["q_norm"](q)
        k = self.attn["k_norm"](k)
        if cache:
            k = torch.cat([cache[0], k], 2)
            v = torch.cat([cache[1], v], 2)
        if cache is not None:
            cache[:] = [k, v]
        rows = torch.arange(k.shape[2] - S, k.shape[2], device=x.device)[:, None]
        seen = torch.arange(k.shape[2], device=x.device) <= rows                      # (S, all rows)
        y = F.scaled_dot_product_attention(q, k, v, seen)
        return self.attn["proj"](y.transpose(1, 2).reshape(B, S, C))

    def forward(self, x, c, cache=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1, cache)
        h = F.gelu(self.mlp["fc1"](self.norm2(x) * (1 + scale2) + shift2))
        return x + gate2 * self.mlp["fc2"](h)


class RAR(nn.Module):
    """p(ids | class) in any order, by the authors' names. Their table holds the codes, an unused id and the
    classes, the last of which is "no class". Without dropout, for use and not for training.
    """

    token_dim = None                                        # tokens are ids

    def __init__(self, seq_len=256, num_classes=1000, vocab_size=1024, n_layer=24, n_head=16, n_embd=768,
                 n_mlp=3072, n_positions=None, n_timesteps=None):
        super().__init__()
        self.seq_len = seq_len
        self.num_classes = num_classes
        self.vocab_size = vocab_size
        n_positions = n_positions or seq_len + 1024         # of which seq_len + 2 are ever read
        n_timesteps = n_timesteps or seq_len + 100
        self.cls_token = nn.Parameter(torch.zeros(1, 1, n_embd))
        self.embeddings = nn.Embedding(vocab_size + 2 + num_classes, n_embd)
        self.pos_embed = nn.Parameter(torch.zeros(1, n_positions, n_embd))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, n_positions, n_embd))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, n_timesteps, n_embd))
        self.blocks = nn.ModuleList(RARBlock(n_embd, n_head, n_mlp) for _ in range(n_layer))
        self.adaln_before_head = nn.ModuleDict(dict(
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(n_embd, 2 * n_embd))))
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def rows(self, ids, cond, order):
        """ids (B, n) in their order, cond (B,), order (B, N) -> x, c (B, 2 + n, C), what the blocks read.

        A row holds a token, its position, and, from the class on, the position of the next one in the order.
        cond: classes, num_classes is none.
        """
        n = ids.shape[1]
        label = self.embeddings(cond + self.vocab_size + 1).unsqueeze(1)              # (B, 1, C)
        x = torch.cat([self.cls_token.expand(len(ids), -1, -1), label, self.embeddings(ids)], 1)
        here = self.pos_embed[0]
        x = x + torch.cat([here[:2].expand(len(ids), -1, -1), here[2 + order[:, :n]]], 1)
        ahead = self.target_aware_pos_embed[0][2 + order[:, :n + 1]]                  # (B, n + 1 or N, C)
        x = x + F.pad(ahead, (0, 0, 1, 1 + n - ahead.shape[1]))           # of all N tokens, the last has none
        return x, label + self.timesteps_embeddings[:, :2 + n]

    def head(self, x, c):
        scale, shift = self.adaln_before_head["adaLN_modulation"](c).chunk(2, -1)     # the scale first, here
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.lm_head(x).float()

    def logits(self, ids, cond, order):
        """ids (B, n) in their order, cond (B,), order (B, N) -> (B, n + 1, V): of these and the next one."""
        x, c = self.rows(ids, cond, order)
        for block in self.blocks:
            x = block(x, c)
        return self.head(x, c)[:, 1:]

    def loss(self, tokens, cond, order):
        """tokens (B, N) in raster order -> mean cross-entropy per token ()."""
        ids = tokens.gather(1, order)
        return F.cross_entropy(self.logits(ids, cond, order)[:, :-1].flatten(0, 1), ids.flatten())

    @torch.no_grad()
    def sample(self, cond, cfg=16.0, power=2.75, temperature=1.0, on_step=None, on_logits=None):
        """cond (B,) classes -> ids (B, N), drawn in raster order. The defaults are RAR-B's.

        Guidance of token t is 1 + (cfg - 1) (1 - cos(pi (t / N)^power)) / 2; power 0: cfg throughout. cfg 1
        or 0: none. temperature 0: the likeliest. on_logits(t, logits) sees them (B, V), after guidance;
        on_step(t, ids, mask) the ids (B, N) so far, mask (B, N) where they are still missing.
        """
        B, N = len(cond), self.seq_len
        guided = cfg not in (0, 1)
        labels = torch.cat([cond, torch.full_like(cond, self.num_classes)]) if guided else cond
        order = torch.arange(N, device=cond.device).expand(len(labels), -1)
        caches = [[] for _ in self.blocks]
        ids = cond.new_zeros(B, 0)
        for t in range(N):
            x, c = self.rows(torch.cat([ids, ids]) if guided else ids, labels, order)
            new = slice(0 if t == 0 else -1, None)          # the rows that no cache has seen
            x, c = x[:, new], c[:, new]
            for block, cache in zip(self.blocks, caches):
                x = block(x, c, cache)
            logits = self.head(x[:, -1], c[:, -1])
            if guided:
                with_class, without = logits.chunk(2)
                scale = 1 + (cfg - 1) * (1 - math.cos(math.pi * (t / N)**power)) / 2
                logits = without + scale * (with_class - without)
            if on_logits is not None:
                on_logits(t, logits)
            p = (logits / max(temperature, 1e-5)).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
            if on_step is not None:
                missing = torch.arange(N, device=cond.device).expand(B, -1) > t
                on_step(t, F.pad(ids, (0, N - 1 - t)), missing)
        return ids


def load_generator(x, seq_len=256):
    """RAR's file or state dict -> RAR in eval mode. seq_len is not to be read off the shapes."""
    sd = {name: value.float() for name, value in load_weights(x).items() if not name.startswith("attn_mask")}
    needed = ("lm_head.weight", "embeddings.weight", "pos_embed", "timesteps_embeddings",
              "blocks.0.attn.q_norm.weight", "blocks.0.mlp.fc1.weight")
    lost = [name for name in needed if name not in sd]
    if lost:
        raise ValueError(f"not the weights of RAR: missing {lost}")
    V, n_embd = sd["lm_head.weight"].shape
    n_layer = len({name.split(".")[1] for name in sd if name.startswith("blocks.")})
    n_head = n_embd // len(sd["blocks.0.attn.q_norm.weight"])
    model = RAR(seq_len, len(sd["embeddings.weight"]) - V - 2, V, n_layer, n_head, n_embd,
                len(sd["blocks.0.mlp.fc1.weight"]), sd["pos_embed"].shape[1],
                sd["timesteps_embeddings"].shape[1])
    ours = model.state_dict()
    odd = sorted(ours.keys() ^ sd.keys())
    if odd:
        raise ValueError(f"the weights of RAR do not fit: {odd[:3]} are in one of file and model only")
    model.load_state_dict(sd)
    return model.eval()
