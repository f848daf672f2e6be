"""What the ranks agree on at no cost: a few numbers in the all-reduce that every optimizer step needs anyway.

At the head of a step the ranks add up how many items their losses are over.  Behind these counts ride: whether this
rank was told to stop, and a number that stands for what it is about to train on.  The sums are the same on all ranks,
so all of them draw the same conclusion at the same step.
"""

import time
import zlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

_RANGE = 1 << 14  # of the number; its square times the square of 4096 ranks is still exact in a float64


class DivergenceError(RuntimeError):
    """The ranks do not train on the same step of the same objective."""


def _nobody() -> tuple[bool, bool]:
    return False, False


class Votes:
    """The ranks' votes of one optimizer step after another.

    Reading a sum on the host waits for the device, so on a GPU it happens every few steps only; on a CPU always.

    Args:
        agree_every_n_steps: Optimizer steps between two readings on a GPU.

    Attributes:
        ask: Returns whether this rank was told to stop: by its cluster, by a person.
        told: The same over all ranks, as far as it was read.
    """

    def __init__(self, agree_every_n_steps: int = 10) -> None:
        self.agree_every_n_steps = agree_every_n_steps
        self.ask: Callable[[], tuple[bool, bool]] = _nobody
        self.clock = Clock()
        self._world = 1
        self.told = (False, False)
        self._steps = 0
        self._held: Tensor | None = None  # on the device: the votes since the last reading
        self._copy: Tensor | None = None  # on the host, as soon as _copied has passed
        self._copied: torch.cuda.Event | None = None

    def begin(self, ask: Callable[[], tuple[bool, bool]]) -> None:
        """Training begins, on all ranks at the same step."""
        self.ask, self.told, self._steps = ask, (False, False), 0
        self._held = self._copied = None

    def add_up(self, counts: list[float], subject: str, world: int, device: torch.device) -> Float[Tensor, " K"]:
        """The sums of ``counts`` over all ranks, float32 on ``device``; all ranks call this together, once a step.

        Raises:
            DivergenceError: if ``subject``, what a rank trains on, is not the same on all of them.
        """
        self._world = world
        values = list(counts)
        if world > 1:
            number = zlib.crc32(subject.encode()) % _RANGE
            values += [*map(float, self.ask()), float(number), float(number**2)]
        # Filled on the device: a copy from the host would wait for all that the device has still to do.
        precise = torch.float64 if world > 1 else torch.float32
        sums = torch.stack([torch.full((), value, device=device, dtype=precise) for value in values])
        self.clock.enters()
        sum_over_ranks(sums, world)
        self.clock.leaves()
        if world > 1:
            self._keep(sums[len(counts) :])
        return sums[: len(counts)].float()

    def _keep(self, votes: Float[Tensor, "4"]) -> None:
        """Hold on to the votes of this step until they are read."""
        apart = (votes[3] * self._world - votes[2] ** 2).abs()
        now = torch.stack([votes[0], votes[1], apart])
        self._steps += 1
        if now.device.type != "cuda":
            self._judge(now)
            return
        self._held = now if self._held is None else self._held + now
        if self._steps % self.agree_every_n_steps == 0:
            # Begun now and read at the step's end: the host then waits for the step's first moments only.
            self._copy, self._copied = self._held.to("cpu", non_blocking=True), _now()
            self._held = None

    def read(self) -> tuple[bool, bool]:
        """Whether any rank was told to stop, by its cluster, by a person: at the end of a step, the same on all ranks.

        Raises:
            DivergenceError: as :meth:`add_up`, where that could not be known at once.
        """
        if self._world == 1:
            return self.ask()
        if self._copied is not None and self._copy is not None:
            self._copied.synchronize()
            copy, self._copied, self._copy = self._copy, None, None
            self._judge(copy)
        return self.told

    def between(self, batch: int, world: int, device: torch.device) -> tuple[bool, bool]:
        """As :meth:`read`, before validation batch ``batch``; every rank has equally many of them."""
        if world == 1:
            return self.ask()
        turn = 0 if device.type != "cuda" else batch % self.agree_every_n_steps
        if turn == 0:
            told = torch.stack([torch.full((), float(vote), device=device) for vote in self.ask()])
            sums = sum_over_ranks(told, world)
            if device.type != "cuda":
                self._judge(torch.cat([sums, sums.new_zeros(1)]))
                return self.told
            self._copy, self._copied = torch.cat([sums, sums.new_zeros(1)]).to("cpu", non_blocking=True), _now()
        elif turn == self.agree_every_n_steps // 2:  # the device has passed it by now
            return self.read()
        return self.told

    def _judge(self, votes: Float[Tensor, "3"]) -> None:
        preempt, interrupt, apart = votes.tolist()
        self.told = (self.told[0] or preempt > 0, self.told[1] or interrupt > 0)
        if apart > 0.5:
            raise DivergenceError(
                "the ranks are not at the same step of the same objective: their data, their configs or their versions "
                "of the code differ; start them all with the same ones, and go on with --resume"
            )


class Clock:
    """This rank's own time in a step, apart from the time in which it waits for others.

    From the batch at hand to the first collective a rank works alone: that is the part by which a slow one shows.  It
    holds the forward of a step's first batch, but under FSDP, whose forward begins with a collective of its own.  On a
    GPU the times are those of the device, taken by events that are read when the device has passed them long ago.
    """

    def __init__(self) -> None:
        self.worked = self.waited = 0.0
        self._began = self._entered = 0.0
        self._marks: list[torch.cuda.Event] = []
        self._open: list[list[torch.cuda.Event]] = []

    def begins(self, device: torch.device) -> None:
        """A batch is at hand."""
        self._marks = []
        if device.type == "cuda":
            self._mark()
        self._began = time.perf_counter()

    def enters(self) -> None:
        """The rank meets the others; what it did before is its own work."""
        self._entered = time.perf_counter()
        if self._marks:
            self._mark()
        elif self._began:
            self.worked += self._entered - self._began

    def leaves(self) -> None:
        """All have come."""
        if self._marks:
            self._mark()
            self._open.append(self._marks)
            self._marks = []
        elif self._began:
            self.waited += time.perf_counter() - self._entered
        self._began = 0.0

    def read(self) -> tuple[float, float]:
        """Seconds of own work and of waiting since the last reading."""
        while self._open and self._open[0][2].query():
            first, second, third = self._open.pop(0)
            self.worked += first.elapsed_time(second) / 1000
            self.waited += second.elapsed_time(third) / 1000
        values, self.worked, self.waited = (self.worked, self.waited), 0.0, 0.0
        return values

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def sum_over_ranks(values: Tensor, world: int) -> Tensor:
    """The sums over all ranks, in place.  Lightning's ``reduce`` would put a barrier, a second collective, before."""
    if world > 1:
        torch.distributed.all_reduce(values)
    return values
