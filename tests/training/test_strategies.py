"""DDP and FSDP2 on two real ranks train what one process trains, and what they stopped they go on with exactly."""

import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import parallel_run
import pytest
import torch
from finetune.labelled import write_labelled
from forks import in_a_fork
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from pairs import TINY
from torch import nn

import mmssl
from mmssl.training.callbacks.ledger import read_ledger
from mmssl.training.checkpoint import AtomicCheckpointIO
from mmssl.training.strategies import distribute

HERE = Path(__file__).parent
CLIP = 0.05  # every step's gradient is longer


@pytest.fixture
def base(tmp_path: Path, tokenizer_path: str, pair_shards: str) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer_path,
        "train": pair_shards,
        "val": pair_shards,
        "batch": 16,
        "folder": str(tmp_path / "run"),
    }


def on_two_ranks(folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    file, out = folder / "cases.json", folder / "found.pt"
    file.write_text(json.dumps(cases))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE.parents[1])))}
    done = subprocess.run(
        [sys.executable, str(HERE / "parallel_run.py"), str(file), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


def same(one: dict[str, Any], two: dict[str, Any], case: str, tolerance: float = 1e-5) -> None:
    """Losses, metrics and gradient norms of every step, gradients, weights and validation."""
    assert len(one["steps"]) == len(two["steps"]), case
    for step, (left, right) in enumerate(zip(one["steps"], two["steps"], strict=True)):
        assert right == pytest.approx(left, rel=tolerance, abs=tolerance), (case, step)
    for step, (mine, theirs) in enumerate(zip(one["grads"], two["grads"], strict=True)):
        for name, gradient in mine.items():
            if gradient is None:  # of a parameter that the step did not use: AdamW does not decay it then
                assert theirs[name] is None, (case, step, name)
                continue
            torch.testing.assert_close(theirs[name], gradient, rtol=tolerance, atol=tolerance, msg=f"{case} {name}")
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=tolerance, atol=tolerance, msg=f"{case} {name}")
    assert two["val"] == pytest.approx(one["val"], rel=tolerance, abs=tolerance), case


def test_two_ranks_train_what_one_process_trains(base: dict[str, Any], tmp_path: Path) -> None:
    """The captions have 7 to 12 words: counts are uneven, so a division per rank or micro-batch would show."""
    mixture = {
        "pairs": {"shards": base["train"]},
        "pictures": {"shards": base["train"], "only": "image"},
        "texts": {"shards": base["train"], "only": "text"},
    }
    labelled = write_labelled(tmp_path / "labelled.tar", 32)
    half = {"batch": 8, "accumulate": 2}
    mixed = {"model": "MMM", "train": mixture, "sgd": False, "steps": 4}
    # With experts there are unused parameters beside used ones, in one sharded block.
    mixed["arguments"] = {"weight_decay": 0.5, "eps": 1e-3, "options": {"experts": True}}
    cases: dict[str, dict[str, Any]] = {
        # Rank 1 begins with other weights, until it takes rank 0's.
        "MLM": {"model": "MLM", "unlike": True, "arguments": {"mask_ratio": 0.5}},
        "MAE": {"model": "MAE"},
        "MMM": {"model": "MMM", "batch": 10, "arguments": {"text_mask_ratio": 0.5}},
        "parts": {"model": "MLM", **half, "arguments": {"mask_ratio": 0.5, "clip_grad_norm": CLIP}},
        "recomputed": {"model": "MMM", **half, "arguments": {"options": {"grad_checkpointing": True}}},
        "mixture": {**mixed, "batch": 8},
        "mixture in parts": {**mixed, **half},  # the last micro-batch may use less than the ones before it
        "retrieval": {"model": "DualEncoder"},
        "classes": {"model": "ImageClassifier", "train": labelled, "val": labelled, "batch": 8},
    }
    probe = {**cases["classes"], "arguments": {"mode": "linear_probe", "head_norm": True}}
    every = {f"{name} {s}": {**base, **c, "strategy": s} for name, c in cases.items() for s in ("ddp", "fsdp")}
    every |= {f"probe {s}": {**base, **probe, "strategy": s} for s in ("ddp", "fsdp")}
    late = {"strategy_options": {"sync_every_micro_batch": False}}
    every |= {f"{name} late": every[f"{name} fsdp"] | late for name in ("parts", "mixture in parts")}
    two = on_two_ranks(tmp_path, every)
    # The averages of a BatchNorm are rank 0's, under DDP too; one process has others.
    assert any("running_mean" in key for key in two["probe ddp"]["weights"])
    same(two["probe ddp"], two["probe fsdp"], "probe")
    for name, case in cases.items():
        whole = {"batch": 16, "accumulate": 1} if name in ("parts", "recomputed") else {}
        one = parallel_run.run({**base, **case, **whole})
        for strategy in ("ddp", "fsdp"):
            found = two[f"{name} {strategy}"]
            same(one, found, f"{name} {strategy}")
            assert name.startswith("mixture") or found["tokens"] == pytest.approx(one["tokens"])  # over all ranks
            counts = [rank["counts"] for rank in found["ranks"]]
            assert name not in ("MLM", "MMM", "parts") or counts[0] != counts[1], "the counts are to be uneven"
            ranks = [rank["keys"] for rank in found["ranks"]]
            assert {len(keys) for keys in ranks[0] + ranks[1]} == {case.get("batch", 16) // 2}
            parts = len(ranks[0]) // len(one["ranks"][0]["keys"])  # of one process's batch, on every rank
            for batch, keys in enumerate(one["ranks"][0]["keys"]):  # no rank sees another one's samples
                theirs = [keys for rank in ranks for keys in rank[batch * parts : (batch + 1) * parts]]
                assert sorted(itertools.chain(*theirs)) == sorted(keys)
            if strategy == "ddp":
                assert found["sent_buffers"] == 0  # constants are not sent before every forward
                continue
            # Each rank holds about half of the weights and of the optimizer's state.
            assert found["mesh"] == [2, 1]
            assert 0.5 <= found["bytes"] / one["bytes"] < 0.53, (name, found["bytes"], one["bytes"])
            # Every micro-batch sends gradients, once for every sharded part; or of a step's the last one alone.
            blocks = {"MLM": 2, "parts": 2, "retrieval": 2, "classes": 2}.get(name, 3)
            assert found["groups"] == blocks + 1
            assert name.startswith("mixture") or found["reductions"] == 3 * (blocks + 1) * parts
            if f"{name} late" in two:
                same(one, two[f"{name} late"], f"{name} late")
                assert name != "parts" or two["parts late"]["reductions"] == 3 * (blocks + 1)
        if name == "parts":
            assert len(one["tokens"]) == 3
            assert all(step["train/grad_norm"] > 2 * CLIP for step in one["steps"])
        if name == "mixture":
            unused = [{key for key, gradient in grads.items() if gradient is None} for grads in one["grads"]]
            assert any("text_expert" in key for key in set().union(*unused))
            assert any("blocks.0.mlp" in key for key in set().union(*unused))


def test_mixed_precision_and_compiled_blocks(base: dict[str, Any], tmp_path: Path) -> None:
    """Autocast rounds one process's larger batch elsewhere, so DDP is what FSDP2 is compared with."""
    bf16 = {**base, "model": "MMM", "precision": "bf16-mixed"}
    compiled = {**base, "model": "MAE", "steps": 2, "arguments": {"compile_blocks": True}}
    recomputed = {"compile_blocks": True, "options": {"grad_checkpointing": True}}
    cases = {f"bf16 {s}": {**bf16, "strategy": s} for s in ("ddp", "fsdp")}
    sent = {"param_dtype": "bfloat16", "reduce_dtype": "bfloat16"}
    cases["bf16 sent"] = {**bf16, "strategy": "fsdp", "strategy_options": sent}
    cases["compiled ddp"] = {**compiled, "strategy": "ddp"}
    cases["recomputed fsdp"] = {**compiled, "strategy": "fsdp", "arguments": recomputed}
    two = on_two_ranks(tmp_path, cases)
    same(two["bf16 ddp"], two["bf16 fsdp"], "bf16")
    same(two["bf16 ddp"], two["bf16 sent"], "bf16, sent as such", tolerance=2e-2)
    plain = parallel_run.run({**compiled, "arguments": {}})
    for name in ("compiled ddp", "recomputed fsdp"):
        same(plain, two[name], name)


def exactly(left: Any, right: Any, where: str) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            exactly(left[key], right[key], f"{where} {key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            exactly(*pair, f"{where} {number}")
    else:
        assert left == right, where


KEPT = ("state_dict", "optimizer_states", "lr_schedulers", "DataModule", "rng")


def test_ten_steps_and_ten_more_are_twenty(base: dict[str, Any], tmp_path: Path) -> None:
    """Paths are dropped at random, on each rank others: its generators' state is part of what goes on."""
    model = {
        **base,
        "model": "MMM",
        "batch": 8,
        "sgd": False,
        "steps": 20,
        "save_every": 10,
        "ledger": True,
        "gradients": False,
    }
    dropped = {**model, "arguments": {"warmup_steps": 3, "clip_grad_norm": 1.0, "options": {"drop_path_rate": 0.3}}}
    smooth = {**model, "arguments": {"warmup_steps": 3, "eps": 1e-3}}

    def case(name: str, content: dict[str, Any], strategy: str = "one", after: str = "") -> dict[str, Any]:
        """Twenty steps in a folder of that name, or those after the tenth of another folder."""
        folder = tmp_path / name
        if not after:
            return {**content, "strategy": strategy, "folder": str(folder)}
        (folder / "ledger").mkdir(parents=True)
        resume = str(tmp_path / after / "checkpoints" / "step=00000010.ckpt")
        return {**content, "strategy": strategy, "folder": str(folder), "resume": resume}

    one = parallel_run.run(case("one", dropped))
    assert one["steps"][10:] == parallel_run.run(case("one again", dropped, after="one"))["steps"]
    reference = parallel_run.run(case("reference", smooth))
    cases = {"folder": {**case("folder", dropped, "fsdp"), "strategy_options": {"checkpoint": "sharded"}}}
    cases["folder again"] = case("folder again", dropped, "fsdp", after="folder")
    for s in ("ddp", "fsdp"):
        cases[s] = case(s, dropped, s)
        cases[f"{s} again"] = case(f"{s} again", dropped, s, after=s)
        cases[f"{s} smooth"] = case(f"{s} smooth", smooth, s)
        cases[f"{s} from one"] = case(f"{s} from one", smooth, s, after="reference")
    two = on_two_ranks(tmp_path, cases)

    def saved(folder: str) -> dict[str, Any]:
        content = AtomicCheckpointIO().load_checkpoint(tmp_path / folder / "checkpoints" / "step=00000020.ckpt")
        return {name: content[name] for name in KEPT}

    for name, ranks in (("one", 1), ("ddp", 2), ("fsdp", 2), ("folder", 2)):
        whole, again = saved(name), saved(f"{name} again")
        assert len(whole["rng"]) == ranks
        if name == "one":  # in this process, where the checks of shapes draw from Python's generator
            del whole["rng"][0]["python"], again["rng"][0]["python"]
        exactly(whole, again, name)
    exactly(saved("fsdp"), saved("folder"), "one file, a folder")
    for s in ("ddp", "fsdp"):
        assert not torch.equal(*(state["torch"] for state in saved(s)["rng"])), "the ranks are to draw apart"
        assert two[s]["steps"][10:] == two[f"{s} again"]["steps"]

    # From one rank to two, and from two to one: within the sums' rounding, and the samples' order exactly.
    after = {**reference, "steps": reference["steps"][10:]}
    order = read_ledger(tmp_path / "reference")
    for s in ("ddp", "fsdp"):
        same(reference, two[f"{s} smooth"], f"twenty steps of {s}")
        same(after, two[f"{s} from one"], f"one, then {s}")
        same(after, parallel_run.run(case(f"one from {s}", smooth, after=f"{s} smooth")), f"{s}, then one")
        assert read_ledger(tmp_path / f"{s} smooth") == order
        for name in (f"{s} from one", f"one from {s}"):
            assert read_ledger(tmp_path / name) == {step: order[step] for step in range(11, 21)}


def plain_mae(**arguments: Any) -> mmssl.MAE:
    return mmssl.MAE("vit_tiny_patch16_224", TINY, **parallel_run.SMALL, **arguments)


def one_step(module: Any, shards: str, folder: Path, strategy: Any, **options: Any) -> Trainer:
    data = mmssl.DataModule(shards, shards, batch_size=4, val_samples=4, num_workers=0)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        **quiet, **options, accelerator="cpu", devices=1, strategy=strategy, max_steps=1, default_root_dir=folder
    )
    trainer.fit(module, data)
    return trainer


class Extra(mmssl.MAE):
    def __init__(self, **arguments: Any) -> None:
        super().__init__("vit_tiny_patch16_224", TINY, **arguments)
        self.scale = nn.Parameter(torch.ones(3))


class Forgets(mmssl.MAE):
    def configure_model(self) -> None:
        pass


@pytest.mark.parametrize(
    ("module", "message"),
    [(Extra, r"the parameters scale of Extra are not sharded"), (Forgets, r"and \d+ more of Forgets are not sharded")],
)
@in_a_fork
def test_parameters_that_nobody_synchronises_are_refused(
    module: type[mmssl.MAE], message: str, pair_shards: str, tmp_path: Path
) -> None:
    arguments = {"backbone": "vit_tiny_patch16_224", "backbone_options": TINY} if module is Forgets else {}
    with pytest.raises(ValueError, match=message) as caught:
        one_step(module(**parallel_run.SMALL, **arguments), pair_shards, tmp_path, mmssl.FSDP())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@in_a_fork
def test_one_module_through_several_trainers(pair_shards: str, tmp_path: Path) -> None:
    """Sharding happens once; evaluation before training is not in inference mode, whose tensors cannot be trained."""
    module = plain_mae()
    first = one_step(module, pair_shards, tmp_path, mmssl.FSDP())
    before = {name: parallel_run.whole(value).clone() for name, value in module.state_dict().items()}
    loops = [first.fit_loop.epoch_loop.val_loop, first.validate_loop, first.test_loop, first.predict_loop]
    assert not any(loop.inference_mode for loop in loops)
    second = one_step(module, pair_shards, tmp_path, mmssl.FSDP())
    second.validate(module, datamodule=second.datamodule)
    changed = [n for n, v in module.state_dict().items() if not torch.equal(parallel_run.whole(v), before[n])]
    assert len(changed) > 10


@in_a_fork
def test_lightnings_own_default_mesh_is_refused(pair_shards: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Lightning's ModelParallelStrategy; .*configs/strategy/fsdp.yaml"):
        one_step(plain_mae(), pair_shards, tmp_path, ModelParallelStrategy())


@pytest.mark.parametrize(
    ("strategy", "unused", "message"),
    [
        (FSDPStrategy(), False, r"Lightning's FSDPStrategy; .*mmssl.FSDP"),
        (DDPStrategy(static_graph=True), False, "static_graph: true, which can leave the ranks' weights apart"),
        (DDPStrategy(find_unused_parameters=False), True, "find_unused_parameters: false, but sources of images"),
    ],
)
def test_strategies_that_train_something_else_are_refused(strategy: Any, unused: bool, message: str) -> None:
    module = plain_mae()
    module._trainer = Mock(strategy=strategy)
    with pytest.raises(ValueError, match=message) as caught:
        distribute(module, module.network, unused)
    assert "\n" not in str(caught.value)


@in_a_fork
def test_what_fsdp_cannot_do_is_one_line(pair_shards: str, tmp_path: Path) -> None:
    for options, message in (
        ({"checkpoint": "half"}, "checkpoint of mmssl.FSDP is 'half'; choose sharded or full"),
        ({"reduce_dtype": "float16"}, "reduce_dtype of mmssl.FSDP is 'float16'; choose float32 or bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):  # without the tests' own check of types, which is quicker
            inspect.unwrap(mmssl.FSDP.__init__)(object.__new__(mmssl.FSDP), **options)
    with pytest.raises(ValueError, match=r"is bfloat16 under trainer.precision 32-true; set trainer.precision"):
        one_step(plain_mae(), pair_shards, tmp_path, mmssl.FSDP(param_dtype="bfloat16"))


@in_a_fork
@pytest.mark.parametrize("checkpoint", ["sharded", "full"])
def test_an_average_of_sharded_weights_is_refused(pair_shards: str, tmp_path: Path, checkpoint: Any) -> None:
    """Lightning's callback copies the module, which FSDP2 stops in the middle of with an assertion."""
    with pytest.raises(
        ValueError, match=r"has EMAWeightAveraging, .* take the callback out, or train under DDP"
    ) as caught:
        one_step(plain_mae(), pair_shards, tmp_path, mmssl.FSDP(checkpoint), callbacks=[EMAWeightAveraging()])
    assert "\n" not in str(caught.value)
