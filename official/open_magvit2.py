"""
The authors' weights of Open-MAGVIT2 (Luo et al. 2024, arxiv.org/abs/2409.04410; TencentARC/SEED-Voken).

    tokenizer = load_tokenizer("imagenet_256_L.ckpt")           # lfq.LFQ, of images or of clips
    model = load_gpt("AR_256_B.ckpt")  # ar_transformer.ARTransformer with a SubTokenHead

Each takes a path or a state dict, reads the sizes off the shapes, returns the model in eval mode and raises
ValueError for unknown or missing keys, by name. What only this release needs is here: a head that draws an id
of 2^18 in two sub-tokens, one after the other.
"""
import math

import torch
import torch.nn as nn

from ar_transformer import ARTransformer, Block, CategoricalHead, RMSNorm, rope_table
from lfq import LFQ
from official.files import fit_keys, load_weights
from official.llamagen import heads_of, names_of, parity

# ---- The tokenizer --------------------------------------------------------------------------------


def load_tokenizer(x, image_size=None, frames=None):
    """Open-MAGVIT2's image or video tokenizer -> lfq.LFQ in eval mode.

    The shapes do not tell image_size (a multiple of the stride: 256 by default, or 128 for video) and the
    frames of a clip (17 by default). Averaged (EMA) weights are taken where the file has them. The video
    weights were trained with normalisation over whole clips, so the first frame's ids depend on the others
    here.
    """
    state = load_weights(x)
    sd = state.get("state_dict", state)
    # the discriminator, and constants
    sd = {k: v for k, v in sd.items() if not k.startswith(("loss.", "quantize."))}
    raw = {k: v for k, v in sd.items() if not k.startswith("model_ema.")}
    if any(k.startswith("model_ema.encoder") for k in sd):  # their keys have lost their dots
        averaged = {k: "model_ema." + k.replace(".", "") for k in raw}
        lost = [key for key in averaged.values() if key not in sd]
        if lost:
            raise ValueError(f"the averaged weights are incomplete: the key {lost[0]} is missing")
        raw = {k: sd[key] for k, key in averaged.items()}
    sd = {k.replace(".conv_1.", "."): v.float() for k, v in raw.items()}           # video names = image names

    def count(start):
        return len({key[len(start):].split(".")[0] for key in sd if key.startswith(start)})

    levels = count("encoder.down.")
    n_res = count("encoder.down.0.block.")
    widths = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    ups = [f"decoder.up.{i}.upsample.conv1.weight" for i in range(1, levels)]
    for key in ("encoder.conv_in.weight", "encoder.conv_out.weight", *widths, *ups):
        if key not in sd:
            raise ValueError(f"not an Open-MAGVIT2 tokenizer: the key {key} is missing")
    ch, channels = sd["encoder.conv_in.weight"].shape[:2]
    video = sd["encoder.conv_in.weight"].ndim == 5
    model = LFQ(image_size or (128 if video else 256), frames or (17 if video else 1),
                bits=len(sd["encoder.conv_out.weight"]), ch=ch,
                ch_mult=tuple(len(sd[key]) // ch for key in widths), n_res=n_res,
                time=tuple(len(sd[key]) // sd[key].shape[1] // 4
                           for key in ups), groups=32, per_frame=not video, channels=channels)
    names = {}                                              # theirs: ours
    for key in model.state_dict():
        part, i, rest = key.split(".", 2)
        layers = [j for j, layer in enumerate(getattr(model, part)) if list(layer.parameters())]
        theirs = layer_names(levels, n_res, part == "decoder")
        names[f"{part}.{theirs[layers.index(int(i))]}.{rest}"] = key
    shapes = model.state_dict()
    ours = fit_keys(sd, names, "the tokenizer's weights")
    model.load_state_dict({key: value.view_as(shapes[key]) for key, value in ours.items()})
    return model.eval()


def layer_names(levels, n_res, decoder=False):
    """Their names of the layers that hold weights, in the order of our Sequential."""
    mid = [f"mid_block.{j}" for j in range(n_res)]
    names = []
    for i in reversed(range(levels)) if decoder else range(levels):
        if decoder:
            names.append(f"adaptive.{i}")
        names += [f"{'up' if decoder else 'down'}.{i}.block.{j}" for j in range(n_res)]
        if decoder and i != 0:
            names.append(f"up.{i}.upsample.conv1")
        if not decoder and i != levels - 1:
            names.append(f"down.{i}.downsample")
    return ["conv_in"] + (mid + names if decoder else names + mid) + ["norm_out", "conv_out"]


# ---- The transformer, and its head -----------------------------------------------------------------

class SubTokenHead(nn.Module):
    """p(id | h) = p(d_1 | h) p(d_2 | h, d_1): an id is cut into sub-tokens of `split` bits, the lowest first.

    For every token a small causal transformer goes over two rows, [h, embedding of d_1]; row i predicts d_i.
    It is the "next sub-token prediction" of the paper: 2^18 ids as 2^6 x 2^12, with 2, 3, 4 of these layers
    on the blocks of gpt-l, gpt-xl, gpt-xxl. The sub-tokens of lfq.FactorizedHead do not see each other. These
    do, so that every distribution over the ids is within reach, at 0.23 s and 0.3 GB a training step where
    those take 0.15 s and 0.2 GB.
    """

    def __init__(self, n_embd, vocab_size, split=(6, 12), n_layer=1, n_head=4, multiple_of=64):
        super().__init__()
        if len(split) < 2 or min(split) < 1 or 1 << sum(split) != vocab_size:
            raise ValueError(
                f"split {tuple(split)}: two or more numbers of bits that make {vocab_size} ids are wanted")
        self.split = tuple(split)
        self.embeds = nn.ModuleList([nn.Embedding(1 << bits, n_embd) for bits in split])
        self.blocks = nn.ModuleList([Block(n_embd, n_head, multiple_of=multiple_of) for _ in range(n_layer)])
        self.norm = RMSNorm(n_embd)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        # they start at zero
        self.heads = nn.ModuleList([CategoricalHead(n_embd, 1 << bits) for bits in split])
        self.register_buffer("rope", rope_table((len(split) - 1,), n_embd // n_head, 1), persistent=False)

    def sub_tokens(self, ids):                        # (...) int64 -> list of (...), one for each run of bits
        return [ids >> sum(self.split[:i]) & (1 << bits) - 1 for i, bits in enumerate(self.split)]

    def embed(self, ids):                                  # (...) int64 -> (..., C), what ARTransformer reads
        return sum(table(d) for table, d in zip(self.embeds, self.sub_tokens(ids)))

    def rows(self, h, sub_tokens):
        """h (..., C) and the first n sub-tokens, each (...) -> (..., n + 1, C). Row i predicts sub-token
        i.
        """
        x = torch.stack([h, *(table(d) for table, d in zip(self.embeds, sub_tokens))], -2)
        y = x.flatten(0, -3)                                                          # (N, n + 1, C)
        for block in self.blocks:
            y = block(y, self.rope[:y.shape[1]])
        return self.norm(y).view(x.shape)

    def loss(self, h, x):
        """The sum of the sub-tokens' cross-entropies, in nats per token: h (..., C), x (...) int64 ->
        (...).
        """
        sub_tokens = self.sub_tokens(x)
        rows = self.rows(h, sub_tokens[:-1]).unbind(-2)
        return sum(head.loss(row, d) for head, row, d in zip(self.heads, rows, sub_tokens))

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0):
        """Draw one id per position: h (..., C) -> ids (...) int64, log p (...), one sub-token after the
        other.

        cfg and temperature may be tuples, one entry for each: the authors take (1.75, 1.85) and (1.1, 1.0) or
        so. There is no cache: to compute the first of two rows twice is cheap.
        """
        n = len(self.split)
        scales = cfg if isinstance(cfg, tuple) else (cfg,) * n
        temperatures = temperature if isinstance(temperature, tuple) else (temperature,) * n
        both = h if h_uncond is None else torch.stack([h, h_uncond])
        drawn = []
        log_p = 0
        for head, scale, t in zip(self.heads, scales, temperatures):
            row = self.rows(both, [d.expand(both.shape[:-1]) for d in drawn])[..., -1, :]
            row, row_uncond = (row, None) if h_uncond is None else row
            d, p = head.sample(row, row_uncond, scale, t, top_k, top_p)
            drawn.append(d)
            log_p = log_p + p
        return sum(d << sum(self.split[:i]) for i, d in enumerate(drawn)), log_p


NAMES = (("cls_embed", "class_emb.embedding_table"), ("blocks.", "spatial_blocks."),            # ours, theirs
         ("head.spatial", "factorized"), ("norm1", "attention_norm"), ("norm2", "ffn_norm"),
         (".attn.", ".attention."), (".mlp.", ".feed_forward."), ("head.embeds.0", "pre_emb"),
         ("head.embeds.1", "post_emb"), ("head.norm", "norm"), ("heads.", ""), (".proj", ""))


def build_gpt(seq_len, num_classes, grid, n_layer, n_head, n_embd, split, head_layers, multiple_of=64):
    """Open-MAGVIT2's GPT with fresh weights. No norm stands between its blocks and those of the head, which
    go on.
    """
    head = SubTokenHead(n_embd, 1 << sum(split), split, head_layers, n_head, multiple_of)
    model = ARTransformer(head, seq_len, num_classes, vocab_size=1 << sum(split), grid=grid, n_layer=n_layer,
                          n_head=n_head, n_embd=n_embd, multiple_of=multiple_of)
    model.norm = nn.Identity()
    head.rope[:1] = 0                                       # its prefix is h, without keys as everywhere here
    return parity(model)


def load_gpt(x, n_head=None, grid=(16, 16)):
    """Open-MAGVIT2's GPT -> ARTransformer with a SubTokenHead in eval mode.

    Of files that hold the tokenizer, too, "transformer." is read. Their "pre" is the low bits of our ids,
    their "post" the high. The shapes do not tell n_head (None: that of the published size) and grid.
    """
    state = load_weights(x)
    sd = next((state[key] for key in ("ema", "model", "module", "state_dict") if key in state), state)
    sd = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in sd.items()}
    sd = {k.removeprefix("transformer."): v for k, v in sd.items() if k.startswith("transformer.")} or sd
    needed = ("pre_emb.weight", "post_emb.weight", "class_emb.embedding_table.weight",
              "spatial_blocks.0.feed_forward.w1.weight")
    lost = [key for key in needed if key not in sd]
    if lost:
        raise ValueError(
            f"not the weights of Open-MAGVIT2's GPT: missing {lost}; the keys begin with {list(sd)[:3]}")

    def depth(start):
        return len({key.split(".")[1] for key in sd if key.startswith(start)})

    pre, C = sd["pre_emb.weight"].shape
    split = (pre.bit_length() - 1, len(sd["post_emb.weight"]).bit_length() - 1)
    model = build_gpt(math.prod(grid),
                      len(sd[needed[2]]) - 1, grid, depth("spatial_blocks."), heads_of(C, n_head), C, split,
                      depth("factorized_blocks."), multiple_of=len(sd[needed[3]]))
    names = names_of(model, NAMES)
    model.load_state_dict(fit_keys({k: v.float() for k, v in sd.items()}, names, "Open-MAGVIT2's GPT"))
    return model.eval()
