"""Tests of common/runs.py: flags, refusals, checkpoints, run folders."""
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
])
def test_train_refuses_in_one_sentence(words, sentence, tmp_path, capsys):
    base = ["--tokenizer", "vae", "--head", "gmm", "--runs", str(tmp_path), "--n_shapes", "50"]
    with pytest.raises(SystemExit) as caught:
        train.main(base + words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_refusals_end_with_an_exit_code_and_no_traceback(tiny_run, tmp_path, capsys):
    folder = str(tiny_run / "shapes-vae-ar-gmm")
    for words, sentence in [(["train.py", *TINY, "--runs", tiny_run, "--beta",
                              "0.5"], "--beta 0.5 does not fit .* --beta 0.02"),
                            (["sample.py", folder, "--class", "heart"], "the classes are disc"),
                            (["evaluate.py", folder, "--n", 3], "--n 3")]:
        out = call(*words, code=1)
        assert re.search(sentence, out) and "Traceback" not in out, out
    for program, words, sentence in [(sample, [tmp_path], "no ckpt.pt"),
                                     (train, ["--tokenizer", "vae", "--no_flag"], "unrecognized arguments"),
                                     (sample, [tiny_run / "shapes-vae"], "a tokenizer alone cannot draw")]:
        with pytest.raises(SystemExit) as caught:           # the interpreter prints its text and exits with 1
            program.main([str(w) for w in words])
        assert caught.value.code not in (0, None) and re.search(sentence,
                                                                f"{caught.value} {capsys.readouterr().err}")


@pytest.mark.parametrize(
    "words, sentence",
    [(["--tokenizer", "vae", "--head", "categorical"], "gives real vectors: use --head gmm"),
     (["--tokenizer", "vq", "--head", "gmm"], "gives ids: use --head categorical"),
     (["--tokenizer", "vq", "--adapter", "flow"], "--adapter: needs --tokenizer vae"),
     (["--tokenizer", "lfq", "--vocab_size", "1000"], "power of 2"),
     (["--tokenizer", "lfq", "--token_dim", "8"], "10 bits for 1024"),
     (["--tokenizer", "vae", "--vocab_size", "64"], "--vocab_size: is for"),
     (["--tokenizer", "vq", "--tokens", "8"], "--tokens: is for"),
     (["--tokenizer", "vq", "--tok_size", "kl16"], "--tok_size kl16: --tokenizer vq has"),
     (["--tokenizer", "vq", "--condition", "text", "--generator", "mar"
       ], "only --generator ar reads captions"),
     (["--tokenizer", "vq", "--condition", "text", "--flip"], "may say left or right"),
     (["--tokenizer", "vae", "--codebook", "l2"], "--codebook: is for"),
     (["--tokenizer", "lfq", "--frames", "5", "--flip"], "moves right"),
     (["--tokenizer", "lfq", "--vocab_size", "1"], "power of 2"),
     (["--tokenizer", "vq", "--vocab_size", "1000", "--groups", "2"], "such as 1024"),
     (["--tokenizer", "vae", "--gan", "-1"], "--gan -1.0: must not be negative")])
def test_what_cannot_work_together_is_refused(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main([*words, "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("flag, value", [("task", "segment"), ("joint", True), ("mix", "full"),
                                         ("stage", "proxy")])
def test_runs_of_the_first_edition_with_options_that_are_gone_are_refused(flag, value, tiny_run, tmp_path):
    state = runs.read_checkpoint(tiny_run / "shapes-vae")
    state["flags"][flag] = value
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit, match=f"--{flag} {value} by the first edition"):
        runs.load_run(tmp_path)


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


def test_to_ask_whether_a_folder_can_be_written_leaves_nothing_behind(tmp_path):
    runs.refuse_folder(tmp_path / "runs" / "shapes-vae")
    assert not list(tmp_path.iterdir())


def test_a_device_has_its_index():
    assert runs.pick_device("cpu") == torch.device("cpu")
    with pretend_gpu():
        assert runs.pick_device("cuda") == torch.device("cuda", 0)
