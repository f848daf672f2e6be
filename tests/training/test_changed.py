"""What a restored optimizer and its schedule take over from the config."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from mmssl.training.changed import ResumeError, follow
from mmssl.training.guard import StepGuard
from mmssl.training.optim import adamw


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


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_of_another_precision_goes_on_with_this_run_s_kernel(fused: bool):
    """16-mixed is not fused and bf16-mixed is: the restored groups would say what the checkpoint's run chose."""

    def made(fused: bool) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 3)
        return network, adamw(network, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=fused)

    def step(network: torch.nn.Linear, optimizer: torch.optim.AdamW, spoil: float = 1.0) -> None:
        (network(torch.ones(2, 4)).square().sum() * spoil).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        StepGuard().check(optimizer, norm, 1)
        optimizer.step()
        optimizer.zero_grad()

    before, its_optimizer = made(not fused)
    step(before, its_optimizer)
    now, optimizer = made(fused)
    now.load_state_dict(before.state_dict())
    optimizer.load_state_dict(copy.deepcopy(its_optimizer.state_dict()))
    assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]
    weights = copy.deepcopy(now.state_dict())
    step(now, optimizer, torch.nan)
    assert all(torch.equal(value, weights[name]) for name, value in now.state_dict().items())
    for network, mine in ((before, its_optimizer), (now, optimizer)):
        step(network, mine)
    torch.testing.assert_close(now.state_dict(), before.state_dict())


def test_an_optimizer_of_one_s_own_that_was_restored_is_guarded_by_its_groups():
    network = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    other = torch.optim.AdamW(torch.nn.Linear(4, 3).parameters(), fused=False)
    optimizer.load_state_dict(other.state_dict())
    network(torch.ones(2, 4)).sum().backward()
    StepGuard().check(optimizer, torch.tensor(torch.nan), 1)
    optimizer.step()  # torch raises where a step that is not fused is told of a bad gradient
    assert not optimizer.state


def test_the_counts_of_steps_follow_the_kernel_to_its_device():
    parameter = torch.nn.Parameter(torch.zeros(1, device="meta"))  # a device that every machine has
    optimizer = torch.optim.AdamW([parameter], fused=False)
    optimizer.state[parameter] = {"step": torch.ones(())}
    follow(optimizer, [{"fused": False, "lr": 1e-3}], None, rate=True)
    assert optimizer.state[parameter]["step"].device.type == "cpu"
    follow(optimizer, [{"fused": True, "lr": 1e-3}], None, rate=True)
    assert optimizer.state[parameter]["step"].device.type == "meta"
