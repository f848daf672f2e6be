"""What the ranks agree on at no cost: a few numbers in the all-reduce that every optimizer step needs anyway.

At the head of a step the ranks add up how many items their losses are over.  Behind these counts ride: whether this
rank was told to stop, a number that stands for what it is about to train on, and the time since the last step.  The
sums are the same on all ranks, so all of them draw the same conclusion at the same step.
"""

import time
import zlib
from collections import deque
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

AGREE_SECONDS = 2.0  # how old a vote may become before it is read; a cluster's grace may be 30 s, with the saving in it
_RANGE = 1 << 14  # of the number; its square times the square of 4096 ranks is still exact in a float64


class DivergenceError(RuntimeError):
    """The ranks do not train on the same step of the same objective."""


def _nobody() -> tuple[bool, bool]:
    return False, False


class Votes:
    """The ranks' votes of one optimizer step after another.

    Reading a sum on the host waits for the device, so on a GPU it happens every few steps only, or every few seconds
    where steps are long; on a CPU always.

    Args:
        agree_every_n_steps: Optimizer steps between two readings on a GPU, at most.

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
        self._every = 1  # steps between two readings, until it is known how long they take
        self._at = 0.0  # when this rank voted last
        self._steps = 0  # whose votes are held
        self._held: Tensor | None = None  # on the device: the votes since the last reading
        self._copy: tuple[Tensor, int] | None = None  # on the host, as soon as _copied has passed; of how many steps
        self._copied: torch.cuda.Event | None = None

    def begin(self, ask: Callable[[], tuple[bool, bool]]) -> None:
        """Training begins, on all ranks at the same step."""
        self.ask, self.told = ask, (False, False)
        self._every, self._at, self._steps = 1, 0.0, 0
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
            values += [*map(float, self.ask()), self._seconds(), float(number), float(number**2)]
        # Filled on the device: a copy from the host would wait for all that the device has still to do.
        precise = torch.float64 if world > 1 else torch.float32
        sums = torch.stack([torch.full((), value, device=device, dtype=precise) for value in values])
        self.clock.enters()
        sum_over_ranks(sums, world)
        self.clock.leaves()
        if world > 1:
            self._keep(sums[len(counts) :])
        return sums[: len(counts)].float()

    def _seconds(self) -> float:
        """Since this was last asked for; many at first, as of a step that compiles."""
        now = time.monotonic()
        before, self._at = self._at, now
        return now - before if before else AGREE_SECONDS

    def _keep(self, votes: Float[Tensor, "5"]) -> None:
        """Hold on to the votes of this step until they are read."""
        apart = (votes[4] * self._world - votes[3] ** 2).abs()
        now = torch.stack([votes[0], votes[1], votes[2], apart])
        self._steps += 1
        if not self._reads_late(now.device):
            self._judge(now, self._steps)
            self._steps = 0
            return
        self._held = now if self._held is None else self._held + now
        if self._steps >= self._every:
            # Begun now and read at the step's end: the host then waits for the step's first moments only.
            self._begin_copy(self._held, self._steps)
            self._held, self._steps = None, 0

    def _reads_late(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def _begin_copy(self, votes: Float[Tensor, "4"], steps: int) -> None:
        self._copy, self._copied = (votes.to("cpu", non_blocking=True), steps), _now()

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
            self._judge(*copy)
        return self.told

    def settle(self) -> None:
        """Read all that is still held, as before a checkpoint; every rank calls this at the same step.

        Raises:
            DivergenceError: as :meth:`add_up`.
        """
        self.read()
        held, self._held = self._held, None
        if held is not None:
            self._judge(held.cpu(), self._steps)
            self._steps = 0

    def meet(self, world: int, device: torch.device) -> tuple[bool, bool]:
        """As :meth:`read`, behind steps of a module in which nothing rides: a collective of its own, every few of them.

        Every rank calls this at the end of each step.
        """
        self._steps += 1
        if self._steps >= self._every:
            votes = [*map(float, self.ask()), self._seconds(), 0.0]
            sums = torch.stack([torch.full((), vote, device=device) for vote in votes])
            self._world = world
            self._judge(sum_over_ranks(sums, world).cpu(), self._steps)
            self._steps = 0
        return self.told

    def between(self, batch: int, world: int, device: torch.device) -> tuple[bool, bool]:
        """As :meth:`read`, before validation batch ``batch``; every rank has equally many of them."""
        if world == 1:
            return self.ask()
        turn = batch % self.agree_every_n_steps if self._reads_late(device) else 0
        if turn == 0:
            votes = [*map(float, self.ask()), 0.0, 0.0]
            sums = sum_over_ranks(torch.stack([torch.full((), vote, device=device) for vote in votes]), world)
            if not self._reads_late(device):
                self._judge(sums, 0)
                return self.told
            self._begin_copy(sums, 0)
        elif turn == self.agree_every_n_steps // 2:  # the device has passed it by now
            return self.read()
        return self.told

    def _judge(self, votes: Float[Tensor, "4"], steps: int) -> None:
        """Draw the conclusions from sums over the ranks and over so many steps."""
        preempt, interrupt, seconds, apart = votes.tolist()
        if steps:
            enough = AGREE_SECONDS * steps * self._world / max(seconds, 1e-9)
            self._every = max(1, int(min(self.agree_every_n_steps, enough)))
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
        self._open: deque[list[torch.cuda.Event]] = deque()

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
            self._close()  # here too: nobody has to read this
        elif self._began:
            self.waited += time.perf_counter() - self._entered
        self._began = 0.0

    def read(self) -> tuple[float, float]:
        """Seconds of own work and of waiting since the last reading."""
        self._close()
        values, self.worked, self.waited = (self.worked, self.waited), 0.0, 0.0
        return values

    def _close(self) -> None:
        """Take the times of the events that the device has passed."""
        while self._open and self._open[0][2].query():
            first, second, third = self._open.popleft()
            self.worked += first.elapsed_time(second) / 1000
            self.waited += second.elapsed_time(third) / 1000

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
