"""Tests of common/sharding.py: two processes against one, with all weights (DDP) or with shares (FSDP2)."""
import json
import shutil
import subprocess
import sys
import time

import pytest
import torch

import ar_transformer
import data
import diffusion_head
import gmm_head
import mar
import maskgit
import perceptual_gan
import train
import vae
from common import drawing, runs, sharding, tokens
from tests.helpers import ENV, ROOT, TINY, log_of

# Without noise inside the models, several processes follow one up to rounding.
SHORT = [*TINY, "--tok_size", "small", "--beta", "0", "--label_drop", "0", "--tok_steps", "8", "--steps", "8",
         "--log_every", "2", "--eval_every", "8", "--size", "nano"]
ADAMW = [*SHORT, "--optimizer", "adamw"]
PARTS = ["--accumulate", "2", "--recompute"]
PAIRS = {                                                   # name of the run: the flags of two processes
    "ddp": [*ADAMW, *PARTS],
    "shard": [*ADAMW, *PARTS, "--shard"],
    "muon": [*SHORT, "--shard"],
    "stopped": [*ADAMW, *PARTS, "--shard"],
    "killed": ADAMW,
}
# One launch for all: it takes seconds. Each run is a whole train.main(), within one group of processes.
WORKER = """
import json, os, shutil, signal, sys
import torch
import data, train
from common import drawing, pictures, runs, sharding
from tests import mini
torch.set_num_threads(1)
mini.begin()
pairs, parent = json.loads(sys.argv[1]), sys.argv[2]
dist = runs.join_processes(train.parse_args(pairs["ddp"]))
drawing.save_reconstructions = pictures.save_curve = lambda *rest: None       # slower than the steps
runs.join_processes = lambda given: dist
runs.leave_processes = lambda dist: None
train.VALIDATED = 50
data.DRAWN["val"] = 600
order = data.order

def stop_at_6(n, batch_size, step, seed):
    if step == 6:
        raise SystemExit("stopped")
    return order(n, batch_size, step, seed)

def killed_at_6(n, batch_size, step, seed):
    if step == 6 and dist.rank == 1:
        print("process 1 kills itself", flush=True)
        with open(f"{parent}/time-of-kill", "w"):
            os.kill(os.getpid(), signal.SIGKILL)
    return order(n, batch_size, step, seed)

def bytes_here(model):
    return sum(p.to_local().nbytes if sharding.is_shared(p) else p.nbytes for p in model.parameters())

make = train.make_optimizers
for name, words in pairs.items():
    seen = []
    train.make_optimizers = lambda model, *rest: seen.append(model) or make(model, *rest)
    words += ["--runs", parent, "--name", name]
    if name != "shard":
        drawing.save_samples = lambda *rest: None
    if name == "stopped":
        train.SAVE_SECONDS, data.order = 0, stop_at_6
        try:
            train.main(words)
        except SystemExit as e:
            assert str(e) == "stopped", e
        runs.wait_for_all(dist)                             # until process 0 has written its checkpoint
        train.SAVE_SECONDS, data.order = 60, order
        words += ["--resume"]
    if name == "killed":
        data.order = killed_at_6
    train.main(words)
    if name == "ddp" and dist.rank == 0:
        shutil.copy(f"{parent}/shapes-vae/tokens-val.pt", f"{parent}/tokens-of-two.pt")
    if name == "shard":
        with open(f"{parent}/bytes-{dist.rank}", "w") as f:
            f.write(str(bytes_here(seen[-1])))
"""


@pytest.fixture(scope="module")
def twos(tmp_path_factory):
    """The folder of all runs of PAIRS by two processes, and of "one" and "one-muon" by one process.

    All share a tokenizer that two processes trained; "one-vae" is one process's.
    """
    parent = tmp_path_factory.mktemp("twos")
    path = parent / "worker.py"
    path.write_text(WORKER)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", path,
             json.dumps(PAIRS), parent]
    with open(parent / "said", "w") as f:
        subprocess.run(list(map(str, words)), stdout=f, stderr=f, cwd=ROOT, timeout=600,
                       env=ENV | {"PYTHONPATH": str(ROOT)})
    assert (parent / "time-of-kill").exists(), (parent / "said").read_text()
    (parent / "seconds").write_text(str(time.time() - (parent / "time-of-kill").stat().st_mtime))
    train.main([*ADAMW, "--runs", str(parent), "--name", "one"])
    train.main([*SHORT, "--runs", str(parent), "--name", "one-muon"])
    train.main([*ADAMW, "--runs", str(parent), "--generator", "none", "--tok_name", "one-vae"])
    return parent


def follows(parent, name, other, digits):
    ours, theirs = log_of(parent, name), log_of(parent, other)
    assert ours.keys() == theirs.keys() and len(ours) == 5
    assert theirs[8] < 0.8 * theirs[1], "they learn"
    for step in ours:
        assert ours[step] == pytest.approx(theirs[step], rel=10 ** -digits), (step, ours, theirs)


@pytest.mark.parametrize("name, other", [("ddp", "one"), ("shapes-vae", "one-vae")])
@pytest.mark.slow
def test_two_processes_with_all_weights_follow_one(name, other, twos):
    """Which computes each batch at once and keeps all activations; they do neither."""
    follows(twos, name, other, 5 if name == "ddp" else 3)


@pytest.mark.slow
def test_two_processes_with_shares_of_the_weights_follow_one(twos):
    follows(twos, "shard", "one", 5)


@pytest.mark.slow
def test_two_processes_encode_a_set_together(twos):
    """Of 600 images in parts of 250, process 0 made the first and the last part."""
    tokenizer = runs.load_run(twos / "shapes-vae").tokenizer
    images = data.load(image_size=16, split="val", n_shapes=600)
    saved = runs.load_file(twos / "tokens-of-two.pt")
    for name, expected in tokens.encode_all(tokenizer, images).items():
        assert saved[name].shape == (600, 4, 8)
        assert torch.allclose(saved[name], expected, atol=1e-5)
    assert not list(twos.rglob("*.tmp")), "nothing is left over"


@pytest.mark.slow
def test_muon_on_shares_follows_muon_on_whole_matrices(twos):
    follows(twos, "muon", "one-muon", 3)                    # it computes in bfloat16


@pytest.mark.slow
def test_a_stopped_and_resumed_sharded_run_equals_the_unbroken_one_bit_for_bit(twos):
    whole, resumed = (runs.read_checkpoint(twos / name) for name in ("shard", "stopped"))
    for part in ("model", "ema"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    assert log_of(twos, "shard") == log_of(twos, "stopped")


@pytest.mark.slow
def test_each_process_holds_half_of_the_weights(twos):
    here = [int((twos / f"bytes-{rank}").read_text()) for rank in (0, 1)]
    total = sum(value.nbytes for value in runs.read_checkpoint(twos / "shard")["model"].values())
    assert sum(here) == total and max(here) < 0.51 * total


@pytest.mark.slow
def test_the_checkpoint_of_a_sharded_run_is_like_that_of_one_process(twos):
    """So sample.py and evaluate.py read it, and one process goes on with it."""
    one, shard = (runs.read_checkpoint(twos / name) for name in ("one", "shard"))
    for part in ("model", "ema"):
        assert one[part].keys() == shard[part].keys()
        for name, value in one[part].items():
            assert torch.allclose(value, shard[part][name], atol=1e-4), name
    for ours, theirs in zip(shard["optimizers"], one["optimizers"], strict=True):
        assert ours["state"].keys() == theirs["state"].keys()
        for i, values in theirs["state"].items():
            assert all(values[name].shape == ours["state"][i][name].shape for name in values)


@pytest.mark.slow
def test_a_sharded_run_draws_and_goes_on_in_one_process(twos, tmp_path):
    images = [drawing.draw_samples(runs.load_run(twos / name), torch.arange(3)) for name in ("one", "shard")]
    assert torch.allclose(*images, atol=1e-2)
    for name in ("one", "shard"):
        for folder in (name, "shapes-vae"):
            shutil.copytree(twos / folder, tmp_path / name / folder)
        train.main([*ADAMW, "--runs", str(tmp_path / name), "--name", name, "--steps", "10", "--resume"])
    one, shard = (log_of(tmp_path / name, name)[10] for name in ("one", "shard"))
    assert shard == pytest.approx(one, rel=1e-5)


def test_shares_need_several_processes(tmp_path):
    with pytest.raises(SystemExit, match="--shard: there is one process.*torchrun"):
        train.main([*TINY, "--runs", str(tmp_path), "--shard"])


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_a_sentence(twos):
    """Process 1 killed itself in the last of the runs."""
    said = (twos / "said").read_text().split("process 1 kills itself")[1]
    assert float((twos / "seconds").read_text()) < 30
    assert "process 0 of 2 has lost another one" in said and "--resume goes on" in said
    assert "train.py\", line" not in said, "no traceback of ours"


def test_a_full_device_is_a_sentence_with_the_remedies(tmp_path, monkeypatch):
    def full(*rest):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(vae.VAE, "forward", full)
    with pytest.raises(SystemExit, match="the memory of the device is full: try --accumulate 2.*--recompute"):
        train.main([*ADAMW, "--runs", str(tmp_path)])


# ---- Parts of a batch, in one process -------------------------------------------------------------

def generators():
    """Name, generator without dropout and dropped labels, tokens (8, 16[, D])."""
    size = dict(n_layer=2, n_head=2, n_embd=32, label_drop=0.0, dropout=0.0, grid=(4, 4))
    ids, real = torch.randint(64, (8, 16)), torch.randn(8, 16, 4)
    yield "ar-gmm", ar_transformer.ARTransformer(gmm_head.GMMHead(32, 4), 16, 3, token_dim=4, **size), real
    head = ar_transformer.CategoricalHead(32, 64)
    yield "ar-ids", ar_transformer.ARTransformer(head, 16, 3, vocab_size=64, **size), ids
    head = maskgit.CategoricalHead(32, 64)
    yield "maskgit-ids", maskgit.MaskGIT(head, 16, 3, vocab_size=64, **size), ids
    yield "maskgit-gmm", maskgit.MaskGIT(gmm_head.GMMHead(32, 4), 16, 3, token_dim=4, **size), real
    head = diffusion_head.DiffusionHead(32, 4, 16, 1)
    yield "mar-diffusion", mar.MAR(head, 16, 3, token_dim=4, n_buffer=4, **size), real


def gradients(model, x, cond, parts, monkeypatch):
    """Loss and gradients as fit() computes them, the masks of all images drawn at once and cut alike."""
    rand = torch.rand
    torch.manual_seed(0)
    table = rand(len(x), 64)

    def same(*shape, device=None):
        """Random numbers that belong to an image, whatever part of the batch it is in."""
        shape = shape[0] if shape and isinstance(shape[0], (tuple, torch.Size)) else shape
        if not shape:
            return torch.tensor(0.5)
        return table[rows, :shape[-1]] if len(shape) == 2 else table[rows, 0]
    monkeypatch.setattr(torch, "rand", same)
    model.zero_grad()
    losses = []
    for part in range(parts):
        rows = torch.arange(len(x))[part::parts]
        loss, _ = model(x[part::parts], cond[part::parts])
        (loss / parts).backward()
        losses.append(loss.detach())
    monkeypatch.undo()
    return sum(losses) / parts, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["ar-gmm", "ar-ids", "maskgit-ids"])
def test_the_mean_over_parts_is_the_loss_of_the_whole_batch(name, monkeypatch):
    """Each image counts alike in these losses. MAR masks as many tokens in each image of a part."""
    _, model, x = next(row for row in generators() if row[0] == name)
    cond = torch.arange(8) % 3
    whole, grads = gradients(model, x, cond, 1, monkeypatch)
    cut, cut_grads = gradients(model, x, cond, 4, monkeypatch)
    assert abs(whole - cut) < 1e-6 * abs(whole)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, cut_grads))


def test_maskgit_on_vectors_weighs_parts_and_not_tokens_alike(monkeypatch):
    """GIVT's mean is over the masked tokens of a batch. Its parts hold more or fewer of them: the mean of
    their means is another estimate of the same loss, as with several processes.
    """
    _, model, x = next(row for row in generators() if row[0] == "maskgit-gmm")
    cond = torch.arange(8) % 3
    whole, _ = gradients(model, x, cond, 1, monkeypatch)
    cut, _ = gradients(model, x, cond, 4, monkeypatch)
    assert 1e-6 < abs(whole - cut) / abs(whole) < 0.1


@pytest.mark.slow
def test_the_loop_cuts_a_batch_into_parts(twos):
    """In one process; the first loss is that of the same weights, before any rounding adds up."""
    train.main([*ADAMW, "--runs", str(twos), "--name", "one-parts", "--accumulate", "4"])
    follows(twos, "one-parts", "one", 5)
    for column in ("loss", "grad_norm"):
        one, four = (log_of(twos, name, column)[1] for name in ("one", "one-parts"))
        assert one == pytest.approx(four, rel=1e-6)


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--batch_size 8 cannot be cut into --accumulate 3 equal parts"):
        train.main([*TINY, "--tok_batch_size", "9", "--runs", str(tmp_path), "--accumulate", "3"])


# ---- Recomputed activations -----------------------------------------------------------------------

def step(model, *inputs):
    torch.manual_seed(1)
    model.zero_grad()
    loss, _ = model(*inputs)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["ar-gmm", "maskgit-ids", "mar-diffusion"])
def test_recomputed_blocks_give_the_same_gradients_with_dropout(name):
    _, model, x = next(row for row in generators() if row[0] == name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    kept = step(model, x, torch.arange(8) % 3)
    names = list(model.state_dict())
    sharding.recompute(model)
    again = step(model, x, torch.arange(8) % 3)
    assert torch.equal(kept[0], again[0])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(kept[1], again[1]))
    assert list(model.state_dict()) == names


def test_recomputed_blocks_give_the_same_gradients_of_tokenizer_and_discriminator():
    tokenizer = vae.VAE(image_size=16, ch=8, ch_mult=(1, 2), groups=4)
    discriminator = perceptual_gan.PatchDiscriminator.for_images(16)
    model = perceptual_gan.AdversarialTokenizer(tokenizer, discriminator, start=0, adaptive=True)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    kept = step(model, images)
    sharding.recompute(model)
    again = step(model, images)
    assert torch.equal(kept[0], again[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(kept[1], again[1]))


def test_recomputed_blocks_keep_less_for_the_backward_pass():
    """Counted are the bytes that autograd saves in the forward pass, weights not among them."""
    size = dict(n_layer=8, n_head=2, n_embd=32, label_drop=0.0, grid=(4, 4))
    model = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 4), 16, 3, token_dim=4, **size)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def kept():
        seen = {}

        def note(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return x
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss, _ = model(torch.randn(8, 16, 4), torch.zeros(8, dtype=torch.long))
        return sum(seen.values()), loss
    before, _ = kept()
    sharding.recompute(model)
    after, _ = kept()
    assert after < before / 3


def test_recomputed_blocks_are_one_graph_for_torch_compile():
    _, model, x = next(generators())
    expected = step(model, x, torch.arange(8) % 3)
    sharding.recompute(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = step(compiled, x, torch.arange(8) % 3)
    assert torch.allclose(expected[0], found[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected[1], found[1]))
