"""
Arms of a comparison, each trained for the same processor time, in turns. Experiments import this file.

Seconds of the clock would count what else the machine does. In turns, a slow minute meets all arms alike.
"""
import math
import time

import torch

TURNS = 10
WARMUP = 50


class Arm:
    """A model, its optimizers, and how much processor time and how many steps it has had."""

    def __init__(self, model, optimizers, lr):
        self.model = model.train()
        for p in model.parameters():
            if p.ndim == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        self.optimizers = optimizers
        self.lr = lr
        self.used = 0.0
        self.steps = 0

    def train(self, draw, until, seconds):
        """Steps on draw() -> the arguments of the model, until `until` of `seconds` are used.

        The learning rate falls along half a cosine of the time used.
        """
        while self.used < until:
            start = time.process_time()
            fall = 0.5 * (1 + math.cos(math.pi * min(1.0, self.used / seconds)))
            lr = self.lr * min((self.steps + 1) / WARMUP, fall)
            loss, _ = self.model(*draw())
            for optimizer in self.optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = lr
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.steps += 1
            self.used += time.process_time() - start


def train_in_turns(arms, draw, seconds):
    """arms: {name: Arm}. Each gets `seconds` of processor time, a tenth in each turn."""
    for turn in range(TURNS):
        for arm in arms.values():
            arm.train(draw, seconds * (turn + 1) / TURNS, seconds)
