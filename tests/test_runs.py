"""Tests of common/runs.py: flags, refusals, checkpoints, run folders."""
import argparse
import copy
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import data
import sample
import train
from common import runs
from tests.helpers import TINY, call
from tests.pretend_gpu import pretend_gpu


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    runs.save_atomically({"step": 1}, path)
    full = path.with_suffix(f".{os.getpid()}.tmp")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    full.symlink_to("/dev/full")                            # writing there fails as on a full disk
    with pytest.raises(data.BadInput, match="could not write"):
        runs.save_atomically({"step": 2, "x": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1} and not full.exists()


@pytest.mark.parametrize("words, sentence", [
    (["--head", "categorical"], "use --head gmm"),
    (["--data", "nowhere"], "no such file or folder"),
    (["--device", "cuda:77"], "--device cuda:77: PyTorch finds no such device"),
    (["--device", "toaster"], "--device toaster: PyTorch finds no such device"),
    (["--resume", "--runs", "nowhere"], "there is no run"),
    (["--resume", "--overwrite"], "give one of them"),
    (["--image_size", "20"], "not a multiple of 8"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--lr", "-1"], "--lr -1.0: must be above 0"),
    (["--label_drop", "1.5"], "must be below 1"),
    (["--head", "diffusion", "--generator", "maskgit"], "--head diffusion gives no density"),
    (["--name", "x", "--tok_name", "x"], "give the two stages folders of their own"),
    (["--image_size", "100000"], "GB are free here"),
    (["--batch_size", "100000000000"], "--batch_size 100000000000: needs at least"),
    (["--n_shapes", "10000000000"], "needs at least"),
    (["--lr", "nan"], "must be above 0"),
    (["--frames", "5"], "only --tokenizer lfq reads clips"),
    (["--frame_step", "2"], "is for clips"),
    (["--text_encoder", "t5-small"], "goes with --condition text"),
    (["--groups", "2"], "goes with --head categorical"),
    (["--size", "gpt-b", "--generator", "maskgit"], "--generator maskgit has nano, tiny"),
    (["--seed", "2147483648"], "--seed 2147483648: must be between"),
    (["--token_dim", "1000000000000"], "--token_dim 1000000000000: needs at least 238,419 GB"),
    (["--n_mix", "1000000000000"], "--n_mix 1000000000000: needs at least 715,256 GB"),
])
def test_train_refuses_in_one_sentence(words, sentence, tmp_path, capsys):
    base = ["--tokenizer", "vae", "--head", "gmm", "--runs", str(tmp_path), "--n_shapes", "50"]
    with pytest.raises(SystemExit) as caught:
        train.main(base + words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_refusals_end_with_an_exit_code_and_no_traceback(tiny_run, tmp_path, capsys):
    folder = tiny_run / "shapes-vae-ar-gmm"
    out = call("evaluate.py", folder, "--n", 3, code=1)     # once as a user sees it
    assert "--n 3" in out and "Traceback" not in out, out
    for program, words, sentence in [(train, [*TINY, "--runs", tiny_run, "--beta", "0.5"],
                                      "--beta 0.5 does not fit .* --beta 0.02"),
                                     (sample, [folder, "--class", "heart"], "the classes are disc"),
                                     (sample, [tmp_path], "no ckpt.pt"),
                                     (train, ["--tokenizer", "vae", "--no_flag"], "unrecognized arguments"),
                                     (sample, [tiny_run / "shapes-vae"], "a tokenizer alone cannot draw")]:
        with pytest.raises(SystemExit) as caught:           # the interpreter prints its text and exits with 1
            program.main([str(w) for w in words])
        assert caught.value.code not in (0, None) and re.search(sentence,
                                                                f"{caught.value} {capsys.readouterr().err}")


# A row or more for every line of runs.REFUSALS: test_every_refusal_has_a_row compares them.
TOGETHER = [
    (["--tokenizer", "vae", "--head", "categorical"], "gives real vectors: use --head gmm"),
    (["--tokenizer", "vq", "--head", "gmm"], "gives ids: use --head categorical"),
    (["--tokenizer", "vq", "--adapter", "flow"], "--adapter: needs --tokenizer vae"),
    (["--tokenizer", "titok-vae", "--adapter", "flow"], "--adapter: needs --tokenizer vae"),
    (["--tokenizer", "lfq", "--vocab_size", "1000"], "power of 2"),
    (["--tokenizer", "lfq", "--vocab_size", "1"], "power of 2"),
    (["--tokenizer", "lfq", "--token_dim", "8"], "10 bits for 1024"),
    (["--tokenizer", "vae", "--vocab_size", "64"], "--vocab_size: is for"),
    (["--tokenizer", "vae", "--codebook", "l2"], "--codebook: is for"),
    (["--tokenizer", "vq", "--tokens", "8"], "--tokens: is for"),
    *[(["--tokenizer", "msvq", "--generator", name], f"--generator {name} does not fit --tokenizer msvq")
      for name in ("ar", "maskgit", "mar")],
    (["--tokenizer", "vq", "--generator", "var"], "--generator var writes scales, .*: use --tokenizer msvq"),
    (["--tokenizer", "msvq", "--codebook", "l2"], "--codebook l2: .* use ema or plain"),
    (["--tokenizer", "msvq", "--groups", "2"], "--groups: --generator var reads codes"),
    (["--tokenizer", "vq", "--tok_size", "kl16"], "--tok_size kl16: --tokenizer vq has"),
    (["--tokenizer", "vq", "--generator", "mar", "--size", "gpt-b"], "--size gpt-b: --generator mar has"),
    (["--tokenizer", "msvq", "--condition", "text", "--generator", "var"], "var reads no captions"),
    (["--tokenizer", "vq", "--condition", "text", "--flip"], "may say left or right"),
    (["--tokenizer", "vq", "--text_encoder", "t5-small"], "goes with --condition text"),
    (["--tokenizer", "vq", "--frames", "5"], "only --tokenizer lfq reads clips"),
    (["--tokenizer", "lfq", "--frames", "5", "--condition", "text"], "asked for by their action only"),
    (["--tokenizer", "lfq", "--frames", "5", "--flip"], "moves right"),
    (["--tokenizer", "lfq", "--frames", "5", "--perceptual", "1"], "looks at time too"),
    (["--tokenizer", "lfq", "--frame_step", "2"], "goes with --frames 17"),
    (["--tokenizer", "lfq", "--frames", "5", "--frame_step", "2"], "is for your own clips"),
    (["--tokenizer", "vae", "--groups", "2"], "goes with --head categorical"),
    (["--tokenizer", "vq", "--codebook", "fsq"], "--codebook fsq: is for --tokenizer lfq"),
    (["--tokenizer", "lfq", "--codebook", "fsq", "--beta", "0.1"], "--beta: .*--codebook fsq has none"),
    (["--tokenizer", "lfq", "--codebook", "fsq", "--vocab_size", "1024"], "nearest is 1000"),
    (["--tokenizer", "vq", "--generator", "mar", "--order", "annealed"], "needs .*--attention causal"),
    (["--tokenizer", "patches", "--token_dim", "20"], "--token_dim 20: patches of --tok_size 4"),
    (["--tokenizer", "patches", "--gan", "0.5"], "nothing is trained in stage 1"),
    (["--tokenizer", "vae", "--tok_steps", "0"], "--tok_steps 0: must be at least 1"),
    (["--tokenizer", "vae", "--head", "diffusion", "--generator", "maskgit"], "gives no density"),
]
NOT_REFUSED_BY_THE_TABLE = [                                # but by the builders
    (["--tokenizer", "vq", "--vocab_size", "1000", "--groups", "2"], "such as 1024"),
    (["--tokenizer", "lfq", "--frames", "4"], "--frames 4 .*: 4 frames do not fit"),
    (["--tokenizer", "vq", "--vocab_size", "10000000000000"], "--vocab_size 10000000000000: needs at least"),
    (["--tokenizer", "titok", "--tokens", "1000000"], "--tokens 1000000: needs at least 238,419 GB"),
]


@pytest.mark.parametrize("words, sentence", TOGETHER + NOT_REFUSED_BY_THE_TABLE)
def test_what_cannot_work_together_is_refused(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main([*words, "--device", "cpu", "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def args_of(words, runs_folder):
    """The resolved args of a command line."""
    given = train.parse_args([*words, "--device", "cpu", "--runs", str(runs_folder)])
    return runs.resolve(given, *runs.folders(given))


def test_every_refusal_has_a_row(tmp_path):
    met = set()
    for words, _ in TOGETHER:
        args = args_of(words, tmp_path)
        refused = [asked(args) and not needed(args) for asked, needed, _ in runs.REFUSALS]
        met.add(refused.index(True))
    missing = [runs.REFUSALS[i][2] for i in range(len(runs.REFUSALS)) if i not in met]
    assert not missing, missing


@pytest.mark.parametrize("name, value, sentence", [
    *((name, 0, "must be at least 1") for name in runs.AT_LEAST_ONE),
    *((name, value, "must be above 0") for name in runs.ABOVE_ZERO
      for value in (0.0, -1.0, float("inf"), float("nan"))),
    *((name, value, "must not be negative") for name in runs.NOT_NEGATIVE
      for value in (-0.5, float("inf"), float("nan"))),
    *((name, 1.0, "must be below 1") for name in runs.BELOW_ONE),
    ("seed", 2 ** 31, "must be between"), ("seed", -2 ** 31, "must be between")])
def test_numbers_outside_their_range_are_refused_by_name(name, value, sentence, tmp_path, monkeypatch):
    args = args_of(TINY, tmp_path)
    runs.refuse(args)
    setattr(args, name, value)
    monkeypatch.setattr(runs, "REFUSALS", [])               # it is the number that is refused
    with pytest.raises(data.BadInput) as caught:
        runs.refuse(args)
    assert str(caught.value) == f"--{name} {value}: " + str(caught.value).split(": ", 1)[1]
    assert sentence in str(caught.value)


def test_the_largest_seed_trains(tmp_path):
    words = [*TINY, "--runs", str(tmp_path), "--generator", "none", "--tok_steps", "2", "--seed"]
    for seed in ("2147483647", "-2147483647"):
        train.main([*words, seed, "--tok_name", seed])
        assert runs.load_run(tmp_path / seed).args.seed == int(seed)


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path):
    args = args_of([*TINY, "--batch_size", "9"], tmp_path)
    runs.refuse(args)
    with pytest.raises(SystemExit, match="--batch_size 9 cannot be shared equally by 2 processes"):
        runs.refuse(args, argparse.Namespace(rank=0, size=2))


def test_a_flag_is_as_given_or_else_as_saved_or_else_the_default(tiny_run, tmp_path):
    """The tiny run was trained with 24 steps, batches of 8 and images of 16 pixels: not repeated here."""
    words = ["--tokenizer", "vae", "--head", "gmm", "--log_every", "7"]
    args = args_of(words, tiny_run)
    assert (args.tok_steps, args.tok_batch_size, args.image_size, args.size) == (24, 8, 16, "mini")
    assert args.log_every == 7
    assert (args.stage1_done, args.stage2_done, args.begun[-1].name) == (True, True, "shapes-vae-ar-gmm")
    fresh = args_of(words, tmp_path)
    default = runs.defaults_of(fresh, torch.device("cpu"))
    for name in runs.STAGE1 + runs.STAGE2 + runs.BOTH:
        if name not in ("tokenizer", "generator", "head"):
            assert getattr(fresh, name) == default[name], name
    assert (fresh.stage1_done, fresh.stage2_done, fresh.begun) == (False, False, [])


def test_another_generator_takes_the_flags_of_the_tokenizer_it_stands_on(tiny_run):
    args = args_of(["--tokenizer", "vae", "--head", "gmm", "--generator", "mar", "--name", "other"], tiny_run)
    assert (args.image_size, args.n_shapes, args.tok_steps) == (16, 200, 24)
    assert args.steps == runs.DEFAULTS["cpu-mar"]["steps"]
    assert runs.stages_to_train(args, tiny_run / "shapes-vae", tiny_run / "other") == [2]


def test_later_lines_of_the_defaults_override_earlier_ones():
    kind = argparse.Namespace(tokenizer="lfq", generator="maskgit", head="categorical", frames=17)
    cpu = runs.defaults_of(kind, torch.device("cpu"))
    assert (cpu["tok_size"], cpu["size"], cpu["steps"], cpu["image_size"]) == ("clips", "tiny", 6500, 16)
    kind.frames = 1
    cpu = runs.defaults_of(kind, torch.device("cpu"))
    assert (cpu["tok_size"], cpu["size"], cpu["steps"], cpu["beta"]) == ("patches", "tiny", 8000, 0.05)
    cuda = runs.defaults_of(kind, torch.device("cuda"))
    assert (cuda["tok_size"], cuda["size"], cuda["steps"]) == ("medium", "medium", 16_000)


def pretend_set(grey):
    """What runs.suit asks of a set of images."""
    images = torch.rand(8, 3, 16, 16)
    if grey:
        images = images[:, :1].expand(-1, 3, -1, -1)

    class Pretended:
        def __len__(self):
            return 8

        def batch(self, index):
            return images[index], None
    return Pretended()


@pytest.mark.parametrize("words, size, codebook, steps", [
    ([], "patches", "ema", 600), (["--tok_size", "patches-coarse"], "patches-coarse", "ema", 700),
    (["--tok_size", "fine"], "fine", "l2-ema", 1000),
    (["--tok_steps", "7", "--codebook", "l2"], "patches", "l2", 7)])
def test_a_size_of_vq_brings_its_own_defaults(words, size, codebook, steps, tmp_path):
    args = args_of(["--tokenizer", "vq", *words], tmp_path)
    assert (args.tok_size, args.codebook, args.tok_steps) == (size, codebook, steps)


@pytest.mark.parametrize("words, grey, numbers, beta", [
    ([], False, 32, 0.005), ([], True, 8, 0.02), (["--beta", "0.1"], False, 32, 0.1),
    (["--token_dim", "24"], False, 24, 0.005)])
def test_a_vae_of_colour_pictures_has_more_numbers_per_token(words, grey, numbers, beta, tmp_path):
    args = args_of(["--tokenizer", "vae", "--data", "mine", *words], tmp_path)
    runs.suit(args, pretend_set(grey))
    assert (args.token_dim, args.beta) == (numbers, beta)
    assert runs.build_tokenizer(args).path.border == (2.0 if grey else runs.BORDER_IN_COLOUR)


def test_what_the_images_are_changes_nothing_of_a_finished_tokenizer(tmp_path, capsys):
    args = args_of(["--tokenizer", "vae", "--data", "mine"], tmp_path)
    args.stage1_done = True                                 # its values were read from the checkpoint
    before = copy.deepcopy(vars(args))
    runs.suit(args, pretend_set(grey=False))
    assert vars(args) == before
    assert capsys.readouterr().out == ""


def test_a_run_begun_before_borders_were_stretched_further_goes_on_with_its_own(tmp_path):
    args = args_of(["--tokenizer", "vae", "--data", "mine"], tmp_path)
    args.by_default.remove("tok_options")                   # read from a checkpoint, as resolve() does
    runs.suit(args, pretend_set(grey=False))
    assert runs.build_tokenizer(args).path.border == 2.0


def test_an_unfinished_run_is_not_overwritten_by_accident(tiny_run, tmp_path):
    folder = tmp_path / "shapes-vae"
    folder.mkdir()
    state = runs.read_checkpoint(tiny_run / "shapes-vae")
    torch.save(state | {"done": False, "step": 12}, folder / "ckpt.pt")
    with pytest.raises(SystemExit, match="--resume.*--overwrite"):
        train.main([*TINY, "--runs", str(tmp_path)])
    assert runs.read_checkpoint(folder)["step"] == 12
    (folder / "ckpt.pt").write_bytes(b"half a file")
    with pytest.raises(SystemExit, match="not a readable checkpoint"):
        train.main([*TINY, "--runs", str(tmp_path)])


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run / "shapes-vae", folder)
    content = bytearray((folder / "ckpt.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "ckpt.pt").write_bytes(content)
    with pytest.raises(SystemExit, match="not a readable checkpoint"):
        runs.load_run(folder)


def test_what_a_kill_left_behind_is_removed_at_the_next_start(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "shapes-vae", tmp_path / "shapes-vae")
    left = tmp_path / "shapes-vae" / "ckpt.4711.tmp"
    left.write_bytes(b"half a checkpoint")
    train.main([*TINY, "--runs", str(tmp_path), "--generator", "none"])
    assert not left.exists()


def test_a_run_goes_on_with_the_same_images_only(tiny_run, tmp_path, capsys):
    """The same data may be named in another way; others are refused."""
    one, copy, other = (data.load(n_shapes=20, image_size=16, seed=seed) for seed in (0, 0, 1))
    assert runs.fingerprint(one) == runs.fingerprint(copy) != runs.fingerprint(other)
    folder = tmp_path / "run"
    folder.mkdir()
    state = runs.read_checkpoint(tiny_run / "shapes-vae")
    torch.save(state | {"fingerprint": runs.fingerprint(one)}, folder / "ckpt.pt")
    args = train.parse_args(TINY)
    args.begun = [folder]
    runs.refuse_other_data(args, folder, copy)
    with pytest.raises(SystemExit, match="these are not the images"):
        runs.refuse_other_data(args, folder, other)
    args.begun = []                                         # trained anew: the old images do not matter
    runs.refuse_other_data(args, folder, other)


@pytest.mark.parametrize("damaged", [False, True])
def test_overwrite_trains_anew_whatever_was_there(damaged, tiny_run, tmp_path):
    """A run on other images, or a checkpoint that cannot be read."""
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        shutil.copytree(tiny_run / name, tmp_path / name)
        if damaged:
            (tmp_path / name / "ckpt.pt").write_bytes(b"half a file")
    args = runs.resolve(train.parse_args([*TINY, "--runs", str(tmp_path), "--seed", "1", "--overwrite"]),
                        tmp_path / "shapes-vae", tmp_path / "shapes-vae-ar-gmm")
    assert runs.stages_to_train(args, tmp_path / "shapes-vae", tmp_path / "shapes-vae-ar-gmm") == [1, 2]
    train_set, _ = runs.open_data(args)
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        runs.refuse_other_data(args, tmp_path / name, train_set)


GONE = dict(task="segment", joint=True, channels=1, likelihood="logistic", corrupt=0.5, stage="proxy",
            mix="full", head_width=64, head_depth=2, batch_mul=8, split=2, n_buffer=4, mask_min=0.7)


@pytest.mark.parametrize("flag", list(GONE))
def test_runs_of_the_first_edition_with_options_that_are_gone_are_refused(flag, tiny_run, tmp_path):
    state = runs.read_checkpoint(tiny_run / "shapes-vae")
    state["flags"][flag] = GONE[flag]
    (tmp_path / "shapes-vae").mkdir()
    torch.save(state, tmp_path / "shapes-vae" / "ckpt.pt")
    sentence = f"--{flag} {GONE[flag]} by the first edition of this project"
    with pytest.raises(SystemExit, match=sentence):
        runs.load_run(tmp_path / "shapes-vae")
    with pytest.raises(SystemExit, match=sentence):         # nor is a generator trained on its tokens
        args_of(["--tokenizer", "vae", "--head", "gmm"], tmp_path)


def test_runs_of_the_first_edition_with_options_that_were_left_alone_load(tiny_run, tmp_path):
    """Its checkpoints name every flag, None where it was not given."""
    state = runs.read_checkpoint(tiny_run / "shapes-vae-ar-gmm")
    state["flags"] |= dict(runs.GONE) | dict(lpips=None, gan_loss="hinge", gan_start=None, adaptive=False,
                                             proxy=None, proxy_flags=None, save_every=100)
    for name in ("tok_options", "options", "skip_bad", "frame_step"):         # which came later
        state["flags"].pop(name, None)
    for given_up in (runs.GONE, dict.fromkeys(runs.GONE)):
        torch.save(state | dict(flags=state["flags"] | given_up), tmp_path / "ckpt.pt")
        ours, theirs = runs.load_run(tmp_path), runs.load_run(tiny_run / "shapes-vae-ar-gmm")
        for part in ("tokenizer", "generator"):
            a, b = (getattr(run, part).state_dict() for run in (ours, theirs))
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_that_lacks_a_part_is_refused(tiny_run, tmp_path):
    state = runs.read_checkpoint(tiny_run / "shapes-vae")
    del state["flags"]["tok_size"]
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit, match="does not fit today's models"):
        runs.load_run(tmp_path)
    del state["classes"]
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit, match="classes missing"):
        runs.load_run(tmp_path)


def test_a_file_in_the_place_of_a_run_folder_is_refused(tmp_path):
    (tmp_path / "shapes-vae").write_text("no folder")
    with pytest.raises(SystemExit, match="is a file, not a folder"):
        train.main([*TINY, "--runs", str(tmp_path)])


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit, match="file is a file, not a folder: give another --runs or --name"):
        train.main([*TINY, "--runs", str(tmp_path / "file" / "runs")])
    with pytest.raises(SystemExit, match="cannot be written .*give another --runs or --name"):
        train.main([*TINY, "--runs", str(tmp_path), "--tok_name", "x" * 300])

    def refused(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "touch", refused)             # root may write anywhere
    with pytest.raises(SystemExit, match=r"shapes-vae cannot be written \(Permission denied\)"):
        train.main([*TINY, "--runs", str(tmp_path)])


def test_a_refused_command_leaves_no_folder(tmp_path):
    with pytest.raises(SystemExit, match="must be at least 1"):
        train.main([*TINY, "--runs", str(tmp_path / "runs"), "--steps", "0"])
    assert not list(tmp_path.rglob("shapes*"))


def test_to_ask_whether_a_folder_can_be_written_leaves_nothing_behind(tmp_path):
    runs.refuse_folder(tmp_path / "runs" / "shapes-vae")
    assert not list(tmp_path.iterdir())


def test_a_device_has_its_index():
    assert runs.pick_device("cpu") == torch.device("cpu")
    with pretend_gpu():
        assert runs.pick_device("cuda") == torch.device("cuda", 0)


# Options that give a model other parameters or another use of them.
LEARNERS = [
    *[["--tokenizer", name, "--generator", "none"] for name in ("vae", "lfq", "titok", "titok-vae")],
    *[["--tokenizer", "vq", "--codebook", codebook, "--generator", "none"] for codebook in runs.CODEBOOKS],
    *[["--tokenizer", "lfq", "--codebook", codebook, "--generator", "none"] for codebook in ("fsq", "bsq")],
    ["--tokenizer", "vq", "--tok_size", "patches", "--generator", "none"],
    ["--tokenizer", "vae", "--beta", "0", "--generator", "none"],
    *[["--tokenizer", "msvq", "--codebook", codebook, "--generator", "none"]
      for codebook in ("ema", "plain")],
    ["--tokenizer", "msvq", "--generator", "var"],
    ["--tokenizer", "lfq", "--frames", "5", "--generator", "none"],
    *[["--tokenizer", "vae", "--generator", generator, "--head", "gmm", *more]
      for generator in ("ar", "maskgit", "mar") for more in ([], ["--n_mix", "1"], ["--adapter", "flow"])],
    *[["--tokenizer", "vae", "--generator", generator, "--head", "diffusion", "--objective", objective]
      for generator in ("ar", "mar") for objective in ("diffusion", "flow")],
    *[["--tokenizer", "vq", "--generator", generator, *more]
      for generator in ("ar", "maskgit", "mar") for more in ([], ["--groups", "2"])],
    *[["--tokenizer", tokenizer, "--generator", "mar", "--attention", "causal", "--order", order]
      for tokenizer in ("vae", "vq") for order in ("random", "raster")],
    *[["--tokenizer", tokenizer, "--condition", "text"] for tokenizer in ("vae", "vq")],
    *[["--tokenizer", "vq", "--generator", generator, "--condition", "text", *more] for generator, more in
      (("maskgit", []), ("mar", []), ("mar", ["--attention", "causal"]))],
    ["--tokenizer", "vae", "--condition", "prefix"],
]


DROPPED = [["--tokenizer", "vae", "--generator", generator] for generator in ("ar", "maskgit", "mar")]


@pytest.mark.parametrize("words, label_drop", [*((words, "0") for words in LEARNERS),
                                               *((words, "0.1") for words in [*LEARNERS[-3:], *DROPPED])],
                         ids=lambda words: "".join(words[1:]).replace("--", "-"))
def test_every_parameter_gets_a_gradient_in_every_step(words, label_drop, tmp_path):
    """DDP waits for all of them, and stops at one that gets none. Dropped or not, of the rows of a table the
    whole parameter counts.
    """
    prefix = "prefix" in words                              # no flag: an option that recipes/pairs.py sets
    words = words[:-2] if prefix else words
    size = [] if "none" in words else ["--size", "nano" if "mar" not in words else "tiny"]
    args = args_of([*words, *size, "--label_drop", label_drop, "--image_size", "16", "--device", "cpu"],
                   tmp_path)
    if "--frames" in words:
        args.tok_size = "clips"
    tokenizer = runs.build_tokenizer(args)
    if args.generator == "none":
        model = tokenizer.train()
        x = torch.rand(4, 3, *[args.frames] * (args.frames > 1), 16, 16) * 2 - 1
        if hasattr(tokenizer, "start"):
            tokenizer.start(x)
        cond = torch.arange(4)
    else:
        args.text_len = 8
        args.options = dict(prefix=(3, tokenizer.token_dim)) if prefix else {}
        model = runs.build_generator(args, tokenizer, 4).train()
        x = torch.randn(4, tokenizer.seq_len, tokenizer.token_dim or 1)
        if tokenizer.vocab_size:
            x = torch.randint(tokenizer.vocab_size, (4, tokenizer.seq_len))
        cond = torch.arange(4)
        if args.condition == "text":
            cond = torch.randint(1, 100, (4, 8), dtype=torch.uint8)
        if prefix:
            cond = torch.randn(4, 3, tokenizer.token_dim)
    loss, _ = model(x, cond)
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
