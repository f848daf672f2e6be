"""The command line: what works, and the one line for everything that does not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mmssl.cli import main
from mmssl.cli.keys import one_line

FIT = ["fit", "--config", "toy.yaml", "--run", "runs/a"]


def error_of(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    """Run a command that must fail with exit code 2 and exactly one line."""
    assert main(args) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("mmssl: error: ")
    assert "\n" not in text
    return text.removeprefix("mmssl: error: ")


def test_help_imports_no_torch_and_lists_everything():
    """Importing torch takes seconds, all else 0.2 s."""
    script = "import sys; from mmssl.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for command in ("fit", "validate", "test", "predict", "report", "tokenizer train"):
        assert f"\n  {command} " in done.stdout
    for command in ("index", "check", "write", "stats"):
        assert f"\n  shards {command} " in done.stdout


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mmssl 0.")


def test_a_run_and_its_folder(toy_folder: Path, capsys):
    assert main(FIT) == 0
    run = toy_folder / "runs" / "a"
    assert (run / "checkpoints" / "step=00000020.ckpt").is_file()
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["run"] == "runs/a"
    assert saved["resume"] is False
    assert saved["model"]["init_args"]["width"] == 4  # resolved: also what was not written
    lines = (run / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,")
    assert {"train/loss", "val/loss", "speed/samples_per_second", "data/bad/truncated"} <= set(lines[0].split(","))
    out = capsys.readouterr().out
    assert "training ToyModule" in out
    assert "validation loss 0.5" in out
    assert "trained 20 steps" in out

    # A second run does not touch it, and --resume on a finished run says so.
    assert "runs/a already holds a run" in error_of(capsys, FIT)
    assert main([*FIT, "--resume"]) == 0
    assert "finished" in capsys.readouterr().out

    # Without --config, a run's own is taken.
    assert main(["validate", "--run", "runs/a"]) == 0
    assert main(["fit", "--run", "runs/a", "--resume", "--trainer.max_steps", "25"]) == 0
    assert "from step 20 to step 25" in capsys.readouterr().out
    assert (run / "config.1.yaml").read_text() != (run / "config.yaml").read_text()
    rows = (run / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [5, 10, 15, 20, 25]  # as checkpoints are named


@pytest.mark.parametrize("run", ["runs/v0.1", "./runs/x", "../w2/runs/x2"])
def test_a_dot_in_a_folder_s_name(toy_folder: Path, run: str):
    assert main(["fit", "--config", "toy.yaml", "--run", run, "--trainer.max_steps=3"]) == 0
    checkpoint = f"{run}/checkpoints/step=00000003.ckpt"
    assert Path(checkpoint).is_file()
    assert main(["validate", "--run", run, "--ckpt_path", checkpoint]) == 0


def test_a_mistyped_run_is_named(toy_folder: Path, capsys):
    for command in ("validate", "predict", "fit"):
        assert error_of(capsys, [command, "--run", "runs/aa"]).startswith("there is no run at runs/aa; give a run")
    (toy_folder / "runs/empty").mkdir(parents=True)
    assert "the run at runs/empty has no config.yaml" in error_of(capsys, ["validate", "--run", "runs/empty"])


def test_validate_says_it_once(toy_folder: Path, capsys):
    assert main([*FIT, "--trainer.max_steps=3"]) == 0
    for command, said in (("validate", "validation loss 0.5"), ("test", "test val/loss 0.5")):  # toy.py names it so
        capsys.readouterr()
        assert main([command, "--run", "runs/a"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
        assert len(lines) == 1
        assert lines[0].endswith(said)
    assert main(["validate", "--run", "runs/a", "--verbose", "true"]) == 0
    assert "Validate metric" in capsys.readouterr().out  # who asks for Lightning's table has it


def test_the_folder_is_named_after_the_config(toy_folder: Path):
    assert main(["fit", "--config", "toy.yaml", "--trainer.max_steps=2"]) == 0
    assert (toy_folder / "runs" / "toy" / "config.yaml").is_file()


def test_a_run_that_failed_while_it_was_built_leaves_its_name_free(toy_folder: Path, capsys):
    assert error_of(capsys, [*FIT, "--model.ratio", "2"]).startswith("ratio is 2.0; give a number between 0 and 1")
    assert main([*FIT, "--trainer.max_steps=2"]) == 0


def test_resume_is_exact(toy_folder: Path):
    """Ten steps, then ten more, with dropout from the global generator, validation and accumulation in between."""
    more = ["--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_steps=10", "--checkpoint.keep=9"]
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/whole", *more]) == 0
    whole = toy_folder / "runs/whole/checkpoints"
    half = toy_folder / "runs/half/checkpoints"
    half.mkdir(parents=True)
    (half / "step=00000010.ckpt").write_bytes((whole / "step=00000010.ckpt").read_bytes())
    assert main(["fit", "--config", "toy.yaml", "--run", "runs/half", "--resume", *more]) == 0
    a, b = (torch.load(folder / "step=00000020.ckpt", weights_only=True)["state_dict"] for folder in (whole, half))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["seen"][:40].tolist() == [1] * 40


def test_resume_errors(toy_folder: Path, capsys):
    assert "there is no run at runs/a" in error_of(capsys, [*FIT, "--resume"])
    (toy_folder / "runs/a").mkdir(parents=True)
    assert "there is no checkpoint in runs/a" in error_of(capsys, [*FIT, "--resume"])
    assert "not both" in error_of(capsys, [*FIT, "--resume", "--ckpt_path", "x"])
    assert "there is no checkpoint x" in error_of(capsys, [*FIT, "--ckpt_path", "x"])
    assert "there is no run at runs/b" in error_of(capsys, ["validate", "--config", "toy.yaml", "--run", "runs/b"])


def test_resume_falls_back_over_a_damaged_checkpoint(toy_folder: Path, capsys):
    assert main([*FIT, "--checkpoint.every_n_steps=10"]) == 0
    newest = toy_folder / "runs/a/checkpoints/step=00000020.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    capsys.readouterr()
    assert main([*FIT, "--resume"]) == 0
    said = capsys.readouterr()
    assert "step=00000020.ckpt: the file is damaged or cut short" in said.err
    assert "from step 10 to step 20" in said.out


def test_a_checkpoint_of_another_model_is_refused(toy_folder: Path, capsys):
    assert main(FIT) == 0
    capsys.readouterr()
    message = error_of(capsys, ["fit", "--run", "runs/a", "--resume", "--trainer.max_steps=30", "--model.width=5"])
    assert message.startswith("the checkpoint does not fit the model")
    # What failed has not become the run's config.
    assert main(["fit", "--run", "runs/a", "--resume", "--trainer.max_steps=22"]) == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--trainer.max_step", "3"], "unknown option --trainer.max_step; did you mean '--trainer.max_steps'?"),
        (["--trainer.max_stepss=3"], "did you mean '--trainer.max_steps'?"),
        (["--model.rato", "0.1"], "--model.rato: ToyModule has no such argument; did you mean '--model.ratio'?"),
        (["--model.init_args.rato", "0.1"], "did you mean '--model.ratio'?"),
        (["--model.width", "abc"], "model.width: expected int, got 'abc'"),
        (["--data.workerss", "3"], "did you mean '--data.workers'?"),
        (["--data.workers", "x"], "data.workers: expected int, got 'x'"),
        (["--model", "MMMM"], "there is no class 'MMMM'; did you mean 'MMM'?"),
        (["--model", "toy.ToyModul"], "toy has no class 'ToyModul'; did you mean 'ToyModule'?"),
        (["--model", "toy.OtherModule"], "changes from ToyModule to OtherModule, which has no argument 'ratio'"),
        (["--model", "OtherModule"], "changes from ToyModule to OtherModule, which has no argument 'ratio'"),
        (["--runn", "x"], "unknown option --runn; did you mean '--run'?"),
        (["stray"], "unrecognized arguments: stray"),
        (["--run", "x", "a.tar", "b.tar"], "unrecognized arguments: a.tar b.tar; put quotes around patterns"),
        (["--run", "x", "b.tar"], "unrecognized arguments: b.tar; put quotes around patterns"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps must be given"),
        (["--checkpoint.keep", "0"], "checkpoint.keep is 0; it must be at least 1"),
        (["--checkpoint.every_n_steps", "0"], "checkpoint.every_n_steps is 0; it must be at least 1"),
        (["--trainer.accelerator", "gpux"], "trainer.accelerator is 'gpux'; did you mean 'gpu'?"),
    ],
)
def test_options_are_strict(toy_folder: Path, capsys, args: list[str], expected: str):
    assert expected in error_of(capsys, [*FIT, *args])
    assert not (toy_folder / "runs/a/config.yaml").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("moddel: {}", "y.yaml: unknown key 'moddel'; did you mean 'model'?"),  # Lightning takes this one
        ("moddel: {a: 1}", "y.yaml: unknown key 'moddel'; did you mean 'model'?"),
        ("trainer: {max_step: 3}", "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        ("model: {init_args: {rato: 1}}", "ToyModule has no argument 'rato'; did you mean 'ratio'?"),
        ("model: {class_path: toy.ToyModule, ratio: 1}", "arguments of the class stand under model.init_args"),
        ("model: {class_path: toy.ToyModule, init_arg: {}}", "unknown key 'model.init_arg'"),
        ("model: {class_path: toy.OtherModule}", "has no argument 'ratio' (set in toy.yaml)"),
        ("model: {class_path: 3}", "model.class_path must be a name such as mmssl.MMM, got 3"),
        ("model: {init_args: {ratio: }}", "model.init_args.ratio has no value"),
        ("model: {init_args: {ratio: x}}", "model.ratio: expected float, got 'x'"),
        ("data: {init_args: {bach_size: 3}}", "ToyData has no argument 'bach_size'; did you mean 'batch_size'?"),
        ("data: {init_args: {batch_size: x}}", "data.batch_size: expected int, got 'x'"),
        ("data: {class_path: nope.Data}", "there is no module 'nope'"),
        ("data: 3", "data must hold class_path and init_args, got 3"),
        ("- 1", "y.yaml must hold keys and values, and holds [1]"),
        ("a: : b", "y.yaml is not valid YAML"),
        ("trainer: 3", "trainer must hold keys"),
        ("trainer: {max_steps: }", "trainer.max_steps has no value"),
        ("trainer: {max_steps: 1.5}", "trainer.max_steps: expected int, got '1.5'"),
        ("trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.Timerr}]}", "did you mean 'Timer'?"),
        (
            "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.Timer, init_args: {durations: 1}}]}",
            "unknown key 'trainer.callbacks[0].init_args.durations': Timer has no argument 'durations'; did you mean",
        ),
        ("resume: maybe", "resume: expected true or false, got 'maybe'"),
        ("seed_everything: x", "seed_everything: expected bool or int, got x"),
    ],
)
def test_configs_are_strict(toy_folder: Path, capsys, content: str, expected: str):
    (toy_folder / "y.yaml").write_text(content)
    assert expected in error_of(capsys, [*FIT, "--config", "y.yaml"])


def test_plain_data_keys_are_those_of_the_data_module(toy_folder: Path, capsys):
    (toy_folder / "y.yaml").write_text("model: toy.OtherModule\ndata: {bach_size: 3}\n")
    message = error_of(capsys, ["fit", "--config", "y.yaml", "--trainer.max_steps=1"])
    assert "unknown key 'data.bach_size'; did you mean 'data.batch_size'?" in message
    (toy_folder / "y.yaml").write_text("model: toy.OtherModule\ndata: {batch_size: 4}\n")
    assert error_of(capsys, ["fit", "--config", "y.yaml", "--trainer.max_steps=1"]) == "data.train must be given"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fitt"], "there is no command 'fitt'; did you mean 'fit'?"),
        (["tokenizer"], "mmssl tokenizer needs one of: train"),
        (["shards", "chekc", "a.tar"], "needs one of: index, check, write, stats, not 'chekc'; did you mean 'check'?"),
        (["shards", "write", "x", "--short-sid", "9"], "unknown option --short-sid; did you mean '--short_side'?"),
        (["fit", "--config", "nope.yaml"], "cannot read the config nope.yaml: No such file or directory"),
        (["fit"], "model must be given"),
        (["tokenizer", "train"], "shards must be given"),
    ],
)
def test_commands_are_strict(toy_folder: Path, capsys, args: list[str], expected: str):
    message = error_of(capsys, args)
    assert expected in message


def test_shards_check_names_the_damaged(toy_folder: Path, capsys):
    assert main(["shards", "check", "nope.tar", "no.tar"]) == 2
    said = capsys.readouterr().err
    assert "nope.tar" in said
    assert "2 of 2 shards cannot be used" in said


def test_a_folder_that_cannot_be_written(toy_folder: Path, capsys):
    (toy_folder / "runs").write_text("in the way")
    assert "cannot write to the run's folder runs/a" in error_of(capsys, FIT)


def test_print_config_shows_the_resolved_config(toy_folder: Path, capsys):
    assert main([*FIT, "--model.width=7", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["width"] == 7


def test_bugs_keep_their_traceback(toy_folder: Path, monkeypatch):
    import toy

    def broken(*args: object) -> None:
        raise ValueError("a bug in the step")

    monkeypatch.setattr(toy.ToyModule, "training_step", broken)
    with pytest.raises(ValueError, match="a bug in the step"):
        main(FIT)


def test_traceback_on_request(toy_folder: Path, monkeypatch):
    monkeypatch.setenv("MMSSL_TRACEBACK", "1")
    with pytest.raises(Exception, match="ratio is 2"):
        main([*FIT, "--model.ratio", "2"])


def test_slurm_does_not_requeue_inside_a_handler(monkeypatch):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    from mmssl.cli.extras import plugins

    assert not any(isinstance(p, SLURMEnvironment) for p in plugins(None))
    for name in ("SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "0")
    [environment] = [p for p in plugins(None) if isinstance(p, SLURMEnvironment)]
    assert environment.auto_requeue is False


def test_other_messages_become_one_line():
    assert one_line("Parser key \"a\":\n  Expected a <class 'int'>. Got value: x\n") == "a: expected int, got 'x'"
    assert "\n" not in one_line("something\n  new\n  - entirely")
