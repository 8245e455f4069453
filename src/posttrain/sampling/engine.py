"""The in-process engine: prompts are prefilled once per group, finished rows leave the batch, waiting requests enter it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from posttrain import draws
from posttrain.models.lm import LM
from posttrain.sampling.decoder import decoder
from posttrain.sampling.draw import draw
from posttrain.sampling.settings import Sampling

PREFILL_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue. The address names its random draws: the same address and seed give the same draws in any batch.

    drawn: how many numbers of its draws have been used by earlier turns of the same episode; what is left of the most tokens is
    for this one, and no more than `most`, where that is given.
    """

    tokens: tuple[int, ...]
    address: tuple[int | str, ...]
    drawn: int = 0
    most: int | None = None

    def budget(self, max_tokens: int) -> int:
        left = max_tokens - self.drawn
        return left if self.most is None else min(left, self.most)


@dataclass(slots=True)
class Completion:
    """The tokens drawn for a request, each with the log-probability that it was drawn with."""

    request: Request
    uniforms: list[float]  # one for each token that it may have
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    stop: Literal["end", "length"] = "length"


class Engine:
    """Samples from a policy. Not a copy: it reads the weights as they are at each step."""

    def __init__(self, lm: LM, sampling: Sampling, stop_ids: Sequence[int], seed: int, rows: int = 256) -> None:
        self.lm, self.sampling, self.seed, self.rows = lm, sampling, seed, rows
        self.stop_ids = frozenset(stop_ids)
        self.waiting: deque[Request] = deque()
        self.running: list[Completion] = []
        self.finished: deque[Completion] = deque()
        self.decoder = decoder(lm)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def next(self) -> Completion | None:
        """The next finished completion, in the order in which they finish; None when there is nothing left to do."""
        while not self.finished and self.busy:
            self._step()
        return self.finished.popleft() if self.finished else None

    @property
    def busy(self) -> bool:
        """Whether there is anything left to draw."""
        return bool(self.waiting or self.running)

    def advance(self) -> list[Completion]:
        """One step further: the completions that are finished now."""
        if self.busy:
            self._step()
        found = list(self.finished)
        self.finished.clear()
        return found

    def partial(self) -> list[int] | None:
        """One step further: the tokens so far of the first completion that is still growing; None when none is."""
        self._step()
        return list(self.running[0].tokens) if self.running else None

    @torch.no_grad()
    def _step(self) -> None:
        free = self.rows - len(self.running)
        if self.running:
            logits = self.decoder.advance(torch.tensor([row.tokens[-1] for row in self.running], device=self.lm.device))
            self._draw(logits, 0)
        if self.waiting and free >= min(len(self.waiting), max(1, self.rows // 4)):
            first = len(self.running)
            self._draw(self._admit(free), first)
        done = [
            index for index, row in enumerate(self.running) if row.stop == "end" or len(row.tokens) == len(row.uniforms)
        ]
        if done:
            self.finished.extend(self.running[index] for index in done)
            for index in reversed(done):
                self.running[index] = self.running[-1]
                self.running.pop()
            self.decoder.drop(done)

    def _admit(self, free: int) -> torch.Tensor:
        """Takes waiting requests into the batch; neighbours with one prompt are prefilled once. Returns their first logits."""
        prompts: list[tuple[int, ...]] = []
        copies: list[int] = []
        size = room = 0
        while self.waiting and free:
            request = self.waiting[0]
            if not prompts or prompts[-1] != request.tokens:
                size += len(request.tokens)
                if prompts and size > PREFILL_TOKENS:
                    break
                prompts.append(request.tokens)
                copies.append(0)
            copies[-1] += 1
            free -= 1
            self.waiting.popleft()
            budget = request.budget(self.sampling.max_tokens)
            uniforms = draws.generator(self.seed, "sample", *request.address).random(request.drawn + budget)
            self.running.append(Completion(request, uniforms[request.drawn :].tolist()))
            room = max(room, budget)
        return self.decoder.admit(prompts, copies, room)

    def _draw(self, logits: torch.Tensor, first: int) -> None:
        """One token for each running row from `first` on."""
        rows = self.running[first : first + len(logits)]
        uniforms = torch.tensor([row.uniforms[len(row.tokens)] for row in rows], dtype=torch.float64, device=logits.device)
        tokens, logp = draw(logits, uniforms, self.sampling)
        for row, token, value in zip(rows, tokens.tolist(), logp.tolist(), strict=True):
            row.tokens.append(token)
            row.logp.append(value)
            if token in self.stop_ids:
                row.stop = "end"
