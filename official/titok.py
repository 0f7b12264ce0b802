"""
The authors' weights of TiTok (bytedance/1d-tokenizer) and of the VQGAN of MaskGIT that its first models build
on.

    tokenizer = load_tokenizer("tokenizer_titok_l32.bin")        # titok.TiTok or titok.TiTokVAE
    generator = load_generator("generator_titok_l32.bin")  # a maskgit.MaskGIT, their blocks and sampler
    vqgan = load_maskgit_vqgan("maskgit-vqgan-imagenet-f16-256.bin")

Each takes a path or a state dict, reads the sizes off the shapes, returns the model in eval mode and raises
ValueError for unknown or missing keys, by name. What only this release needs is here: a BERT and a U-ViT in
MaskGIT's place, a sampler that reveals by raw logits, a reshape that mixes tokens and channels.

Shapes:  B batch, T tokens, V codes, C width, D numbers in a code, S = 1 + T positions
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import maskgit
import titok
from official.files import fit_keys, load_weights

# ---- The generator: a BERT, or for 128 tokens a U-ViT, trained to fill in masked ids ---------------


class BertBlock(nn.Module):
    """A post-norm transformer block with biases everywhere. Dropout on the attention weights and after the
    second linear layer, as in BERT.
    """

    def __init__(self, n_embd, n_head, n_mlp, dropout=0.1):
        super().__init__()
        self.n_head = n_head
        self.attention_dropout = dropout
        self.norm1 = nn.LayerNorm(n_embd, eps=1e-12)
        self.wqkv = nn.Linear(n_embd, 3 * n_embd)
        self.wo = nn.Linear(n_embd, n_embd)
        self.norm2 = nn.LayerNorm(n_embd, eps=1e-12)
        self.fc1 = nn.Linear(n_embd, n_mlp)
        self.fc2 = nn.Linear(n_mlp, n_embd)
        self.dropout = nn.Dropout(dropout)

    def attend(self, x):                                    # (B, S, C) -> (B, S, C)
        B, S, C = x.shape
        q, k, v = self.wqkv(x).view(B, S, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        y = maskgit.attention(q, k, v, dropout=self.attention_dropout if self.training else 0.0)
        return self.dropout(self.wo(y.transpose(1, 2).reshape(B, S, C)))

    def mlp(self, x):
        return self.dropout(self.fc2(F.gelu(self.fc1(x))))

    def forward(self, x):                                   # (B, S, C) -> (B, S, C)
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.mlp(x))


class UViTBlock(BertBlock):
    """The same pre-norm, without a bias for queries, keys and values. Dropout before the second linear
    layer, too.
    """

    def __init__(self, n_embd, n_head, n_mlp, dropout=0.0):
        super().__init__(n_embd, n_head, n_mlp, dropout)
        self.norm1 = nn.LayerNorm(n_embd, eps=1e-5)
        self.norm2 = nn.LayerNorm(n_embd, eps=1e-5)
        self.wqkv = nn.Linear(n_embd, 3 * n_embd, bias=False)

    def mlp(self, x):
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))

    def forward(self, x):                                   # (B, S, C) -> (B, S, C)
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


SCALES = {                                              # of guidance at progress r in [0, 1): c + cfg (c - u)
    "constant": lambda cfg, r: 1 + cfg,
    "linear": lambda cfg, r: 1 + cfg * r,
    "power-cosine": lambda cfg, r: 1 + (cfg - 1) * (1 - math.cos(math.pi * r**3)) / 2,
}


class TiTokGenerator(maskgit.MaskGIT):
    """MaskGIT as TiTok's authors trained and sampled it: "bert" blocks, or "uvit" blocks with long skips.

    Training masks round(T arccos(u) / (pi/2)) tokens, and the tokens that are not masked count a tenth in the
    loss, which is a mean over the batch. n_layer of "uvit" is odd: as many blocks after the middle one as
    before. dropout: None is 0.1 for "bert", everywhere, and 0 for "uvit": the configs say 0.1 for both, but
    the authors' code does not hand it to the blocks of a U-ViT.
    """

    def __init__(self, seq_len, num_classes, vocab_size, style, n_layer, n_head, n_embd, n_mlp, dropout=None,
                 seen_weight=0.1):
        if style == "uvit" and n_layer % 2 == 0:
            raise ValueError(f"a U-ViT has an odd n_layer, not {n_layer}")
        if dropout is None:
            dropout = 0.0 if style == "uvit" else 0.1
        head = maskgit.CategoricalHead(n_embd, vocab_size)
        head.proj = nn.Linear(n_embd, vocab_size)           # theirs has a bias
        super().__init__(head, seq_len, num_classes, vocab_size=vocab_size, n_layer=0, n_head=n_head,
                         n_embd=n_embd, dropout=dropout, smoothing=0.1)
        self.seen_weight = seen_weight
        block = UViTBlock if style == "uvit" else BertBlock
        self.blocks = nn.ModuleList(block(n_embd, n_head, n_mlp, dropout) for _ in range(n_layer))
        n_skips = n_layer // 2 if style == "uvit" else 0
        self.merges = nn.ModuleList(nn.Linear(2 * n_embd, n_embd) for _ in range(n_skips))
        self.norm_in = nn.Identity() if style == "uvit" else nn.LayerNorm(n_embd, eps=1e-12)
        self.norm = nn.LayerNorm(n_embd, eps=1e-5) if style == "uvit" else nn.Identity()

    def hidden_states(self, tokens, cond, mask):
        """tokens (B, T), cond (B,), mask (B, T) -> h (B, T, C). In a U-ViT the last block also sees what left
        the first.
        """
        x = torch.cat([self.cls_embed(cond).unsqueeze(1), self.embed(tokens, mask)], dim=1)
        x = self.dropout(self.norm_in(x + self.pos_embed))                            # (B, 1 + T, C)
        n_skips = len(self.merges)
        skips = []
        for i, block in enumerate(self.blocks):
            if n_skips and i > n_skips:
                x = self.merges[i - n_skips - 1](torch.cat([x, skips.pop()], dim=-1))
            x = block(x)
            if i < n_skips:
                skips.append(x)
        return self.norm(x[:, 1:])

    def training_mask(self, B, device):
        """-> mask (B, T): round(T arccos(u) / (pi/2)) random tokens of each image, and at least one."""
        u = torch.rand(B, 1, device=device)
        n = (self.seq_len * maskgit.SCHEDULES["arccos"](u)).round().clamp(1, self.seq_len)
        rank = torch.rand(B, self.seq_len, device=device).argsort(1).argsort(1)
        return rank < n

    def forward(self, tokens, cond):
        """tokens (B, T), cond (B,) -> loss (), logs. Tokens that are not masked weigh seen_weight, masked
        ones 1.
        """
        if self.training and self.label_drop > 0:
            drop = torch.rand(cond.shape, device=cond.device) < self.label_drop
            cond = torch.where(drop, self.num_classes, cond)
        mask = self.training_mask(len(tokens), tokens.device)
        h = self.hidden_states(tokens, cond, mask)
        weight = mask + self.seen_weight * ~mask                                      # (B, T)
        loss = maskgit.masked_mean(self.head.loss(h, tokens, self.smoothing), weight, per_image=False)
        with torch.no_grad():
            nll = maskgit.masked_mean(self.head.loss(h, tokens), mask, per_image=False)
            accuracy = maskgit.masked_mean(self.head.argmax(h) == tokens, mask, per_image=False)
        return loss, {"nll": nll, "accuracy": accuracy}

    @torch.no_grad()
    def sample(self, cond, steps=8, cfg=4.5, temperature=9.5, cfg_schedule="linear", anneal=True,
               on_step=None):
        """The authors' sampler: cond (B,) class labels -> ids (B, T). All T tokens are drawn.

        Unlike MaskGIT.sample, it takes the likeliest id under noise that fades, and keeps tokens by the raw
        logit of that id under such noise, not by its probability; how many stay masked falls along arccos.
        cfg is theirs, c + cfg (c - u), constant or growing by equal steps from 0. With "power-cosine" it is
        the usual scale, from 1 up to cfg. anneal: logits / (0.5 + 0.8 (1 - progress)). Published as (steps,
        temperature, cfg): L-32 (8, 9.5, 4.5) and B-64 (8, 11, 3), linear; S-128 (64, 2.8, 6.9), power-cosine.
        """
        if cfg_schedule not in SCALES:
            raise ValueError(f"cfg_schedule must be one of {', '.join(SCALES)}, not {cfg_schedule}")
        B, T, device = len(cond), self.seq_len, cond.device
        tokens = torch.zeros(B, T, dtype=torch.long, device=device)
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        both = torch.cat([cond, torch.full_like(cond, self.num_classes)])
        n_left = T
        for step in range(steps):
            r = (step + 1) / steps
            c, u = self.logits(tokens.repeat(2, 1), both, mask.repeat(2, 1)).chunk(2)              # (B, T, V)
            logits = u + SCALES[cfg_schedule](cfg, step / steps) * (c - u)
            if anneal:
                logits = logits / (0.5 + 0.8 * (1 - r))
            drawn = (logits + temperature * (1 - r) * gumbel(logits.shape, device)).argmax(-1)
            tokens = torch.where(mask, drawn, tokens)
            score = logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            score = score + temperature * (1 - r) * gumbel((B, T), device)
            n_left = max(1, min(n_left - 1, math.floor(T * math.acos(r) / (math.pi / 2))))
            if step + 1 == steps:
                n_left = 0
            mask = mask & maskgit.lowest(score.masked_fill(~mask, math.inf), n_left)
            if on_step is not None:
                on_step(step, tokens, mask)
        return tokens


def gumbel(shape, device):
    """Gumbel noise as the authors draw it."""
    u = torch.rand(shape, device=device)
    return -(-u.clamp(min=1e-20).log()).clamp(min=1e-20).log()


def load_generator(x, n_head=16):
    """TiTok's generator, a BERT or, for 128 tokens, a U-ViT -> TiTokGenerator in eval mode.

    Their ids are one table: V codes, masked, the classes, no class. n_head is not to be read off the shapes.
    """
    sd = {
        k.removeprefix("model."): v.float()
        for k, v in load_weights(x).items() if not k.endswith("position_ids")
    }
    uvit = "mid_block.norm1.weight" in sd
    if uvit:
        table, place, fc1 = "embeddings.weight", "pos_embed", "mid_block.mlp.fc1.weight"
    else:
        table, place = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
        fc1 = "encoder.layer.0.intermediate.dense.weight"
    lost = [key for key in (table, place, "lm_head.weight", fc1) if key not in sd]
    if lost:
        raise ValueError(f"not the weights of TiTok's generator: missing {lost}")
    V, n_embd = sd["lm_head.weight"].shape
    seq_len = sd[place].shape[-2] - 1
    half = len({key.split(".")[1] for key in sd if key.startswith("in_blocks.")})
    n_layer = 2 * half + 1 if uvit else len({k.split(".")[2] for k in sd if k.startswith("encoder.layer.")})
    model = TiTokGenerator(seq_len,
                           len(sd[table]) - V - 2, V, "uvit" if uvit else "bert", n_layer, n_head, n_embd,
                           n_mlp=len(sd[fc1]))
    names = uvit_names(half) if uvit else bert_names(n_layer)                         # theirs: ours
    ours = fit_keys(sd, names, "the generator's weights")
    for i in range(0 if uvit else n_layer):
        for kind in ("weight", "bias"):
            qkv = [
                sd[f"encoder.layer.{i}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")
            ]
            ours[f"blocks.{i}.wqkv.{kind}"] = torch.cat(qkv)
    ours["tok_embed.weight"] = sd[table][:V]
    ours["mask_embed"] = sd[table][V]
    ours["cls_embed.weight"] = sd[table][V + 1:]
    ours["pos_embed"] = sd[place][0] if uvit else sd[place] + sd["embeddings.token_type_embeddings.weight"][0]
    model.load_state_dict(ours)
    return model.eval()


def bert_names(n_layer):
    """The keys of a BERT of n_layer layers with its output layer -> ours, None where load_generator puts it
    together.
    """
    names = {f"embeddings.{name}_embeddings.weight": None for name in ("word", "position", "token_type")}
    parts = {
        "attention.output.dense": "wo", "attention.output.LayerNorm": "norm1", "intermediate.dense": "fc1",
        "output.dense": "fc2", "output.LayerNorm": "norm2"
    }
    for kind in ("weight", "bias"):
        names[f"embeddings.LayerNorm.{kind}"] = f"norm_in.{kind}"
        names[f"lm_head.{kind}"] = f"head.proj.{kind}"
        for i in range(n_layer):
            for name in ("query", "key", "value"):
                names[f"encoder.layer.{i}.attention.self.{name}.{kind}"] = None
            for theirs, ours in parts.items():
                names[f"encoder.layer.{i}.{theirs}.{kind}"] = f"blocks.{i}.{ours}.{kind}"
    return names


def uvit_names(half):
    """The keys of a U-ViT of half + 1 + half blocks with its output layer -> ours, None as in bert_names."""
    names = {"embeddings.weight": None, "pos_embed": None}
    blocks = [f"in_blocks.{i}"
              for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    parts = {"norm1": "norm1", "attn.proj": "wo", "norm2": "norm2", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    for kind in ("weight", "bias"):
        names[f"norm.{kind}"] = f"norm.{kind}"
        names[f"lm_head.{kind}"] = f"head.proj.{kind}"
        for i in range(half):
            names[f"out_blocks.{i}.skip_linear.{kind}"] = f"merges.{i}.{kind}"
        for i, block in enumerate(blocks):
            for theirs, ours in parts.items():
                names[f"{block}.{theirs}.{kind}"] = f"blocks.{i}.{ours}.{kind}"
    for i, block in enumerate(blocks):
        names[f"{block}.attn.qkv.weight"] = f"blocks.{i}.wqkv.weight"
    return names


# ---- The tokenizer --------------------------------------------------------------------------------

class ShuffledLinear(nn.Linear):
    """The last layer of the first three published encoders, which learned to live with a slip of the pen.

    They reshape (T, C) to (C, T) where they should transpose, so that the T outputs are shuffled among
    themselves.
    """

    def forward(self, x):                                   # (B, T, C) -> (B, T, D)
        B, T, _ = x.shape
        return super().forward(x.reshape(B, -1, T).transpose(1, 2))


def load_tokenizer(x, n_head=None, l2_norm=None):
    """The authors' tokenizer_titok_* -> titok.TiTok, or titok.TiTokVAE for real vectors, in eval mode.

    n_head is width / 64, and l2_norm true for the two-stage models, unless given. Their pixels are in [0, 1]:
    that is put into the first and the last layer, so that images come and go in [-1, 1] as everywhere here.
    """
    sd = {k: v.float() for k, v in load_weights(x).items()}
    for key in ("encoder.patch_embed.weight", "encoder.conv_out.weight", "decoder.decoder_embed.weight",
                "latent_tokens", "decoder.ffn.0.weight", "decoder.positional_embedding"):
        if key not in sd:
            raise ValueError(f"not a TiTok: the key {key} is missing")
    pixel = {}                                             # the decoder of the proxy, of the two-stage models
    for key in list(sd):
        if key.startswith(("pixel_decoder.", "pixel_quantize.")):
            ours = key.replace("pixel_decoder.", "decoder.").replace("pixel_quantize.", "quantize.")
            pixel[ours] = sd.pop(key)
    two_stage = "decoder.ffn.2.weight" in sd
    model = empty_tokenizer(sd, pixel, two_stage, n_head, l2_norm)
    if two_stage:
        out = model.encoder.out
        model.encoder.out = ShuffledLinear(out.in_features, out.out_features)
    ours = {k: v for k, v in model.state_dict().items() if k.startswith(("proxy.", "latent_"))}
    ours |= fit_keys(sd, titok_names(model), "the tokenizer's weights")
    for part, name in (("encoder", "pos"), ("decoder", "canvas")):                    # only these sums matter
        place = sd[f"{part}.positional_embedding"]
        ours[f"{part}.cls"] = sd[f"{part}.class_embedding"] + place[:1]
        ours[f"{part}.{name}"] = place[1:]
    ours["decoder.canvas"] = ours["decoder.canvas"] + sd["decoder.mask_token"][0]
    ours["encoder.latents"] = sd["latent_tokens"] + sd["encoder.latent_token_positional_embedding"]
    weight = sd["encoder.patch_embed.weight"] / 2           # of (x + 1) / 2
    ours["encoder.patch_embed.weight"] = weight
    ours["encoder.patch_embed.bias"] = sd["encoder.patch_embed.bias"] + weight.sum((1, 2, 3))
    if not two_stage:                                       # 2 y - 1
        ours["decoder.smooth.weight"] = 2 * sd["decoder.conv_out.weight"]
        ours["decoder.smooth.bias"] = 2 * sd["decoder.conv_out.bias"] - 1
    shapes = model.state_dict()
    model.load_state_dict({k: v.reshape(shapes[k].shape) for k, v in ours.items()})   # 1 x 1 convolutions
    return model.eval()


def empty_tokenizer(sd, pixel, two_stage, n_head, l2_norm):
    """A TiTok of the sizes that the shapes of the authors' state dict tell."""
    patch = sd["encoder.patch_embed.weight"].shape[-1]
    side = math.isqrt(len(sd["decoder.positional_embedding"]) - 1)
    size = dict(image_size=patch * side, patch=patch, n_tokens=len(sd["latent_tokens"]))
    for ours, part in (("enc", "encoder"), ("dec", "decoder")):
        width = len(sd[f"{part}.ln_pre.weight"])
        n_layer = len({k.split(".")[2] for k in sd if k.startswith(f"{part}.transformer.")})
        size[ours] = (width, n_layer, n_head or width // 64)
    if two_stage:
        size["stage"] = "finetune" if pixel else "proxy"
        size["proxy"] = load_maskgit_vqgan(pixel, (side, side)) if pixel else None
        size["proxy_vocab"] = len(sd["decoder.ffn.2.bias"])
    D = sd["decoder.decoder_embed.weight"].shape[1]
    if len(sd["encoder.conv_out.weight"]) == 2 * D:
        return titok.TiTokVAE(token_dim=D, **size)
    if "quantize.embedding.weight" not in sd:
        raise ValueError("not a TiTok of ids: the key quantize.embedding.weight is missing")
    return titok.TiTok(vocab_size=len(sd["quantize.embedding.weight"]), code_dim=D, ema=0,
                       l2_norm=two_stage if l2_norm is None else l2_norm, **size)


def titok_names(model):
    """The authors' keys -> ours, None where load_tokenizer puts them together."""
    names = {"latent_tokens": None, "decoder.mask_token": None,
             "decoder.decoder_embed.weight": "decoder.embed.weight",
             "decoder.decoder_embed.bias": "decoder.embed.bias",
             "encoder.latent_token_positional_embedding": None,
             "decoder.latent_token_positional_embedding": "decoder.pos"}
    if model.vocab_size:
        names["quantize.embedding.weight"] = "quantizer.codebook"
    parts = {"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "wo", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"}
    for kind in ("weight", "bias"):
        for part, module in (("encoder", model.encoder), ("decoder", model.decoder)):
            for i in range(len(module.blocks)):
                block = f"{part}.transformer.{i}"
                names[f"{block}.attn.in_proj_{kind}"] = f"{part}.blocks.{i}.wqkv.{kind}"
                for theirs, ours in parts.items():
                    names[f"{block}.{theirs}.{kind}"] = f"{part}.blocks.{i}.{ours}.{kind}"
            for end in ("pre", "post"):
                names[f"{part}.ln_{end}.{kind}"] = f"{part}.norm_{end}.{kind}"
        names[f"encoder.conv_out.{kind}"] = f"encoder.out.{kind}"
        names[f"encoder.patch_embed.{kind}"] = None
        if model.decoder.proxy_vocab:
            names[f"decoder.ffn.0.{kind}"] = f"decoder.out.0.{kind}"
            names[f"decoder.ffn.2.{kind}"] = f"decoder.out.2.{kind}"
        else:
            names[f"decoder.ffn.0.{kind}"] = f"decoder.out.{kind}"
            names[f"decoder.conv_out.{kind}"] = None
    for part in ("encoder", "decoder"):
        names[f"{part}.class_embedding"] = None
        names[f"{part}.positional_embedding"] = None
    return names


# ---- MaskGIT's VQGAN, the proxy of the two-stage models -------------------------------------------

class PixelBlock(nn.Module):
    """A residual block as MaskGIT wrote it.

    Where the width changes, the shortcut starts from h and not from x, and what is added to h is a 1 x 1
    convolution of h itself. Published weights need it so.
    """

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, c_in, eps=1e-6)
        self.norm2 = nn.GroupNorm(32, c_out, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(c_out, c_out, 1, bias=False) if c_in != c_out else None

    def forward(self, x):                                   # (B, c_in, h, w) -> (B, c_out, h, w)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


def last_layers(c, n_out, kernel):
    return [nn.GroupNorm(32, c, eps=1e-6), nn.SiLU(), nn.Conv2d(c, n_out, kernel, padding=kernel // 2)]


class MaskGITVQGAN(nn.Module):
    """MaskGIT's tokenizer (2202.04200, section 3.1), for published weights: no attention, pixels in [0, 1]
    inside.
    """

    token_dim = None

    def __init__(self, grid=(16, 16), vocab_size=1024, code_dim=256, ch=128, ch_mult=(1, 1, 2, 2, 4), n_res=2,
                 encoder=True):
        super().__init__()
        self.grid = tuple(grid)
        self.seq_len = math.prod(grid)
        self.vocab_size = vocab_size
        lowest = ch * ch_mult[-1]
        c = ch
        down = [nn.Conv2d(3, ch, 3, padding=1, bias=False)]
        for level, mult in enumerate(ch_mult):
            for _ in range(n_res):
                down.append(PixelBlock(c, ch * mult))
                c = ch * mult
            if level < len(ch_mult) - 1:
                down.append(nn.AvgPool2d(2))
        down += [PixelBlock(c, c) for _ in range(n_res)] + last_layers(c, code_dim, 1)
        self.encoder = nn.Sequential(*down) if encoder else None              # a TiTok file has only the rest
        self.quantizer = titok.VectorQuantizer(vocab_size, code_dim, l2_norm=False)
        up = [nn.Conv2d(code_dim, lowest, 3, padding=1)] + [PixelBlock(lowest, lowest) for _ in range(n_res)]
        for level in reversed(range(len(ch_mult))):
            for _ in range(n_res):
                up.append(PixelBlock(c, ch * ch_mult[level]))
                c = ch * ch_mult[level]
            if level:
                up += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)]
        self.decoder = nn.Sequential(*up, *last_layers(c, 3, 3))

    def latents(self, images):
        """images (B, 3, H, W) in [-1, 1] -> z (B, T, D), not yet rounded."""
        return self.encoder((images + 1) / 2).float().flatten(2).transpose(1, 2)

    def decode_raw(self, q):
        """Codes q (B, T, D) -> images (B, 3, H, W), not clamped."""
        return 2 * self.decoder(q.transpose(1, 2).unflatten(2, self.grid)).float() - 1

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> ids (B, T) int64."""
        return self.quantizer.nearest(self.latents(images))

    @torch.no_grad()
    def decode(self, tokens):
        """ids (B, T) int64 -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode_raw(self.quantizer.codes(tokens)).clamp(-1, 1)


def load_maskgit_vqgan(x, grid=(16, 16)):
    """The PyTorch port of the weights, maskgit-vqgan-imagenet-f16-256.bin -> MaskGITVQGAN in eval mode.

    grid: (rows, columns) of ids, which the shapes do not tell. Decoder and codebook alone, as TiTok's files
    have them, are enough.
    """
    sd = {k: v.float() for k, v in load_weights(x).items()}
    for key in ("decoder.norm_out.weight", "quantize.embedding.weight"):
        if key not in sd:
            raise ValueError(f"not a MaskGIT VQGAN: the key {key} is missing")

    def count(start):
        return len({key[len(start):].split(".")[0] for key in sd if key.startswith(start)})

    ch = len(sd["decoder.norm_out.weight"])
    levels = count("decoder.up.")
    n_res = count("decoder.mid.")
    mult = tuple(len(sd.get(f"decoder.up.{i}.block.0.conv1.weight", "")) // ch for i in range(levels))
    vocab_size, code_dim = sd["quantize.embedding.weight"].shape
    model = MaskGITVQGAN(grid, vocab_size, code_dim, ch, mult, n_res, encoder="encoder.conv_in.weight" in sd)

    mid = [f"mid.{j}" for j in range(n_res)]
    order = {
        "encoder": [f"down.{i}.block.{j}" for i in range(levels) for j in range(n_res)] + mid, "decoder": mid
    }
    for i in reversed(range(levels)):
        order["decoder"] = order["decoder"] + [f"up.{i}.block.{j}" for j in range(n_res)]
        if i:
            order["decoder"] = order["decoder"] + [f"up.{i}.upsample_conv"]
    names = {"quantize.embedding.weight": "quantizer.codebook"}                       # theirs: ours
    for part in ("encoder", "decoder") if model.encoder is not None else ("decoder",):
        layers = [(i, layer) for i, layer in enumerate(getattr(model, part)) if list(layer.parameters())]
        theirs = ["conv_in", *order[part], "norm_out", "conv_out"]
        for (i, layer), name in zip(layers, theirs, strict=True):
            names |= {f"{part}.{name}.{key}": f"{part}.{i}.{key}" for key in layer.state_dict()}
    model.load_state_dict(fit_keys(sd, names, "the VQGAN's weights"))
    return model.eval()
