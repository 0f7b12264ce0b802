"""What every homework uses: a test looks at a function, and what it saw is compared with the truth.

A test holds no expected values. It makes random inputs from a seed, calls a function and notes what it sees:
values, gradients, types, shapes, whether inputs stayed as they are. The truth is what the same test sees of
a right answer. Students have it as numbers, made when the homework was handed out (homework/truths/); the
grader looks at the teacher's own file, under another seed. So remembered numbers are of no use.
"""
import contextlib
import functools
import importlib
import io
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
# In README's order, in which a course reads them.
MODELS = ("gmm_head vae ar_transformer vq maskgit diffusion_head mar flow_adapter lfq titok perceptual_gan "
          "var"          ).split()
STUDENTS_SEED = 0                                           # the grader has another one: see grade --seed


class Look:
    """The notes of one test: what it saw, in order. It makes the test's random inputs, too.

    They come from a generator of their own. However many random numbers an answer draws, the inputs stay the
    same.
    """

    def __init__(self, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.seen = []                                      # (what, value, tolerance, hint)
        torch.manual_seed(seed)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.random)

    def rand(self, *shape):
        return torch.rand(shape, generator=self.random)

    def randint(self, most, *shape):
        """Whole numbers 0 .. most - 1."""
        return torch.randint(most, shape, generator=self.random)

    def order(self, n):
        """The numbers 0 .. n - 1, shuffled."""
        return torch.randperm(n, generator=self.random)

    def fill(self, module, std=0.3):
        """Every parameter of a module becomes noise, so that none of them is 0 or alike -> the module."""
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(std * self.randn(*p.shape))
        return module

    def see(self, what, value, hint="", tolerance=1e-4):
        """Note a tensor, a number, a truth value, a word or a list of them. The truth must be the same, a
        tensor up to `tolerance` of its largest value (or of 1). hint: what a difference may mean.
        """
        if isinstance(value, torch.Tensor):
            value = value.detach().clone()
        elif isinstance(value, (tuple, torch.Size)):
            value = list(value)
        elif not isinstance(value, (bool, int, float, str, list, type(None))):
            value = f"a {type(value).__name__}"
        self.seen.append((what, value, tolerance, hint))

    def call(self, what, f, inputs, hint="", tolerance=1e-4, outputs=None, params=None, gradients=True,
             fixed=(), logs=(), **options):
        """Call f(*inputs.values(), **options) and note all about it -> what it gave.

        Noted are its values, their shapes and types, whether the inputs are as they were, and the gradient of
        a random sum of the outputs for every input and parameter of real numbers. inputs: {name: tensor, or
        tuple of tensors}. outputs: names, where f gives several. params: a module, or {name: parameter}.
        logs: the names to look for in an output of that name. fixed: inputs whose gradient nobody needs.
        gradients=False: a function that only samples.
        """
        leaves = {}

        def own(name, x):
            if isinstance(x, (tuple, list)):
                return type(x)(own(f"{name}[{i}]", part) for i, part in enumerate(x))
            if not isinstance(x, torch.Tensor):
                return x
            x = x.detach().clone()
            if x.is_floating_point() and gradients and name not in fixed:
                leaves[name] = x.requires_grad_()
                x = x * 1                                   # no leaf, so that f may even write into it
            return x

        given = [own(name, x) for name, x in inputs.items()]
        before = [x.detach().clone() for x in tensors(given)]
        with contextlib.nullcontext() if gradients else torch.no_grad():
            out = f(*given, **options)
        found = list(out) if isinstance(out, (tuple, list)) else [out]
        if outputs:
            self.see(f"how many values {what} gives", len(found), "See the docstring.")
        names = outputs or [what]
        for name, value in zip(names, found):
            if name == "logs":
                for key in logs:                            # there may be more
                    self.see(f"logs[{key!r}]", value.get(key), hint, tolerance)
            else:
                self.see(name, value, hint, tolerance)
        same = all(torch.equal(x, y) for x, y in zip(tensors(given), before))
        self.see(f"the inputs of {what} stay as they were", same, "The caller still needs them.")
        if gradients:
            wanted = leaves | named(params)
            self.gradients(what, [v for v in found if isinstance(v, torch.Tensor)], wanted, hint, tolerance)
        return out

    def gradients(self, what, outputs, wanted, hint="", tolerance=1e-4):
        """Note the gradient of a random sum of the outputs for each of wanted, {name: tensor}."""
        weights = torch.Generator().manual_seed(len(self.seen))
        total = torch.zeros((), dtype=torch.float64)
        for value in outputs:
            if value.requires_grad:
                weight = torch.randn(value.shape, generator=weights, dtype=torch.float64)
                total = total + (value.double() * weight).sum()
            elif value.is_floating_point():
                torch.randn(value.shape, generator=weights, dtype=torch.float64)
        found = [None] * len(wanted)
        if total.requires_grad:
            found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, retain_graph=True)
        for (name, x), gradient in zip(wanted.items(), found):
            gradient = torch.zeros_like(x) if gradient is None else gradient
            self.see(f"the gradient of {what} for {name}", gradient, hint, max(tolerance, 1e-3))

    def goal(self, what, value, *distances):
        """Note a number that a capstone has reached, for each distance from the optimum that gives points."""
        for near in distances:
            self.see(f"{what}, within {near}", torch.as_tensor(value).detach().float())

    def form(self, what, x):
        """Note shape and type of random numbers, whose values nobody can know."""
        kind = str(x.dtype)[6:] if isinstance(x, torch.Tensor) else type(x).__name__
        self.see(f"shape and type of {what}", [*getattr(x, "shape", ()), kind], "See the docstring.")

    def draws(self, what, draw, hint=""):
        """draw() gives random numbers: note whether torch's seed repeats them and each call has new ones."""
        torch.manual_seed(11)
        first = draw()
        second = draw()
        torch.manual_seed(11)
        again = draw()
        self.see(f"{what}: the same torch seed gives the same", bool(torch.equal(first, again)),
                 "All randomness must come from torch's global generator.")
        self.see(f"{what}: each call draws anew", not torch.equal(first, second),
                 "No seed belongs inside the function.")
        torch.manual_seed(5)

    def independent(self, what, x, most=0.15):
        """x (N, ...): note whether its entries are independent of each other, by their correlations."""
        x = x.detach().flatten(1).double()
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-9)
        correlation = (x.T @ x / len(x)).fill_diagonal_(0).abs().max().item()
        self.see(f"{what} are independent of each other", correlation < most,
                 "Images, positions and channels each need random numbers of their own.")


def tensors(x):
    """All tensors in nested tuples and lists, in order."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for part in x for t in tensors(part)] if isinstance(x, (tuple, list)) else []


def named(params):
    """A module's parameters, or a dict of them -> {name: parameter}."""
    if isinstance(params, torch.nn.Module):
        return dict(params.named_parameters())
    return params or {}


# ---- Tests -------------------------------------------------------------------------------------------

def exercise(target, points, hidden=False, further=False, goals=(), also=()):
    """This test grades `target`, such as "vae.VAE.kl". hidden: it is not in the handout, and graded all the
    same. further: it belongs to the second tier, beyond the ten points of a file. goals: what a capstone is
    to reach, [(what, optimum, distances from it, hint)], in the order in which it tells look.goal(). Each
    distance kept is a share of the points. also: functions of the file, such as "VAE.kl", that would give the
    answer away; a handout blanks them, too.
    """
    def mark(probe):
        @functools.wraps(probe)
        def test():
            seen, failed = looked(test, STUDENTS_SEED)
            _, _, wrong = judged(seen, failed, truth_of(test, STUDENTS_SEED))
            assert not wrong, wrong

        del test.__wrapped__                                # or pytest takes `look` for a fixture
        test.probe = probe
        test.exercise = target
        test.points = points
        test.hidden = hidden
        test.further = further
        test.also = also
        test.goals = [(f"{what}, within {near}", torch.tensor(float(best)), near / max(1, abs(best)), hint)
                      for what, best, distances, hint in goals for near in distances]
        return test
    return mark


def looked(test, seed):
    """What a test sees now, and what went wrong: [(what, value, tolerance, hint)], an Exception or None."""
    look = Look(seed)
    try:
        test.probe(look)
        return look.seen, None
    except Exception as e:
        return look.seen, e


def differs(value, truth, tolerance):
    """What is wrong with a value, in a few words, or ""."""
    if not isinstance(truth, torch.Tensor):
        if isinstance(value, torch.Tensor):
            return f"is a tensor of shape {tuple(value.shape)} and not {truth!r:.60}"
        if value == truth and type(value) is type(truth):
            return ""
        if isinstance(truth, bool):
            return "is not so"
        return f"is {value!r:.60} and not {truth!r:.60}"
    if not isinstance(value, torch.Tensor):
        return f"is no tensor: {value!r:.40}"
    if value.shape != truth.shape:
        return f"has shape {tuple(value.shape)} and not {tuple(truth.shape)}"
    if value.dtype != truth.dtype:
        return f"is {str(value.dtype)[6:]} and not {str(truth.dtype)[6:]}"
    if not truth.numel():
        return ""
    if not truth.is_floating_point():
        if torch.equal(value, truth):
            return ""
        wrong = (value != truth).flatten()
        first = int(wrong.nonzero()[0])
        pair = value.flatten()[first].item(), truth.flatten()[first].item()
        return f"is wrong in {int(wrong.sum())} of {len(wrong)} places, such as {pair[0]} and not {pair[1]}"
    value = value.double()
    truth = truth.double()
    finite = truth.isfinite()
    if not value.isfinite()[finite].all():
        bad = value[finite][~value.isfinite()[finite]][0].item()
        return f"is {bad} where {truth[finite][~value.isfinite()[finite]][0].item():.4g} is right"
    if not torch.equal(value[~finite], truth[~finite]):
        return f"is {value[~finite][0].item():.4g} where {truth[~finite][0].item():.4g} is right"
    if not finite.any():
        return ""
    error = (value - truth)[finite]
    if error.abs().max() <= tolerance * truth[finite].abs().max().clamp(min=1):
        return ""
    if value.numel() > 1 and value[finite].abs().max() == 0:
        return f"is 0 everywhere, and not up to {truth[finite].abs().max():.3g}"
    return f"is off by {error.mean():+.3f} on average and by {error.abs().max():.3g} at most"


def judged(seen, failed, truth):
    """Compare what was seen with the truth -> how many checks are right, of how many, the first that is
    wrong in a sentence, or "".

    failed: None, an Exception, or a sentence about what ended the test before all was seen.
    """
    right = 0
    wrong = ""
    for (what, value, *_), (name, true, tolerance, hint) in zip(seen, truth):
        error = differs(value, true, tolerance) if what == name else f"comes where {what!r} was seen"
        if error.startswith("is 0 everywhere") and "gradient" in name:
            error = "is 0: nothing reaches it, as if cut off"
        if not error:
            right += 1
        elif not wrong:
            wrong = f"{name} {error}. {hint}".strip()
    if isinstance(failed, NotImplementedError):
        wrong = "not written yet"
    elif failed is not None and not wrong:
        wrong = failed if isinstance(failed, str) else f"{type(failed).__name__}: {failed}"
    elif not wrong and len(seen) < len(truth):
        wrong = f"{truth[len(seen)][0]}: not reached"
    return right, len(truth), wrong


# ---- Truths ------------------------------------------------------------------------------------------

def truth_file(name):
    return ROOT / "homework" / "truths" / f"{name}.pt"


@functools.lru_cache(maxsize=None)
def stored_truths(name):
    """The numbers that came with a handout -> {test: what a right answer shows}."""
    return torch.load(truth_file(name), weights_only=True)


@functools.lru_cache(maxsize=None)
def truth_of(test, seed):
    """What a test sees of a right answer. In a handout it is stored. Here it is what the teachers' second
    answers show, written by other means than the model files, so that each is the other's check.
    """
    if test.goals:
        return test.goals
    name = test.exercise.split(".")[0]
    if truth_file(name).is_file():
        return [tuple(row) for row in stored_truths(name)[test.__name__]]
    from homework import answers                            # not in a handout
    with answers.in_place_of(test.exercise), contextlib.redirect_stdout(io.StringIO()):     # they print
        seen, failed = looked(test, seed)
    if failed is not None:
        raise failed
    return seen


def fit(parameters, loss, steps, lr):
    """Adam with a falling rate on loss() -> (): what a capstone trains with."""
    opt = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - step / steps)
        value = loss()
        opt.zero_grad()
        value.backward()
        opt.step()


def closed(module, name, replacement):
    """While it lasts, a function of a module or class is another one."""
    owner = importlib.import_module(module) if isinstance(module, str) else module
    return patch.object(owner, name, replacement)
