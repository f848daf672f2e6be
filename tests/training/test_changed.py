"""What a restored optimizer and its schedule take over from the config."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from mmssl.training.changed import ResumeError, follow


def built(lr: float, schedule: type[LRScheduler] | None) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=lr)
    if schedule is LambdaLR:
        return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return optimizer, None if schedule is None else StepLR(optimizer, 2)


def restored(lr: float, schedule: type[LRScheduler] | None, *, rate: bool) -> tuple[float, float]:
    """(lr, momentum) after a run at a rate of 1 went on, behind three steps, with another one."""
    before, its_schedule = built(1.0, schedule)
    for _ in range(3):
        before.step()
        if its_schedule is not None:
            its_schedule.step()
    now, schedule_now = built(lr, schedule)
    asked = [{name: value for name, value in group.items() if name != "params"} for group in now.param_groups]
    now.load_state_dict(copy.deepcopy(before.state_dict()))
    if its_schedule is not None and schedule_now is not None:
        schedule_now.load_state_dict(copy.deepcopy(its_schedule.state_dict()))
    follow(now, asked, schedule_now, rate=rate)
    return now.param_groups[0]["lr"], now.param_groups[0]["momentum"]


def test_the_rate_follows_a_function_of_the_step():
    assert restored(1.0, LambdaLR, rate=True) == (0.25, 1.0)
    assert restored(2.0, LambdaLR, rate=True) == (0.5, 2.0)


def test_without_a_schedule_the_rate_may_be_set_by_hand():
    assert restored(2.0, None, rate=True) == (2.0, 2.0)
    assert restored(2.0, None, rate=False) == (1.0, 2.0)


def test_a_schedule_with_a_memory_is_refused_another_rate():
    assert restored(1.0, StepLR, rate=True) == (pytest.approx(0.1), 1.0)
    with pytest.raises(ResumeError, match=r"rate was 1.0 in the checkpoint, now 2.0, and StepLR cannot take another"):
        restored(2.0, StepLR, rate=True)
