"""TARGET hf:FOLDER: a folder of transformers in, one that computes the same out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx.cli.main import main
from tests.support.checkpoint_files import contents
from tests.support.language_models import build, hf

TOKENS = torch.arange(24).reshape(2, 12) % 64


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def saved(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny random model as transformers saves it, in several shards."""
    model = build(name).to(dtype)
    model.save_pretrained(folder / "in", max_shard_size="20KB")
    assert (folder / "in" / "model.safetensors.index.json").is_file()
    (folder / "in" / "tokenizer.json").write_text("{}")
    return folder / "in"


def loaded(folder: Path) -> nn.Module:
    """What transformers makes of a folder, in the type that it was saved in."""
    made: nn.Module = hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return made.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llama, grouped queries", "gemma"])
def test_transformers_loads_the_output_and_gets_the_same_logits(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(folder, name)
    before = contents(path)
    assert main(["balance", "hf:in", "--output", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["norm_after"] < found["norm_before"]
    assert found["verified"]["float64_change"] < 1e-12
    assert contents(path) == before
    after = contents(folder / "out")
    assert after.keys() == before.keys()
    same = {file for file in after if after[file] == before[file]}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= same
    old, new = loaded(path), loaded(folder / "out")
    moved = [n for n, p in new.named_parameters() if not torch.equal(p, old.get_parameter(n))]
    assert "model.layers.1.mlp.down_proj.weight" in moved
    assert torch.allclose(logits(new), logits(old), rtol=1e-4, atol=1e-5)


def test_the_page_shows_the_gammas_that_count_in_the_norm(folder: Path) -> None:
    saved(folder, "llama")
    assert main(["balance", "hf:in", "--output", "out", "--html", "a.html"]) == 0
    rows = (folder / "a.html").read_text()
    for name, parameter in loaded(folder / "in").named_parameters():
        assert parameter.dim() == 2 or "norm" in name
        assert name.removesuffix(".weight") in rows, name


def test_in_bfloat16_powers_of_two_change_no_bit(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(folder, "llama", torch.bfloat16)
    assert main(["balance", f"hf:{path}", "--output", "out", "--exact", "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)["verified"]
    assert (verified["dtype"], verified["identical"]) == ("bfloat16", True)
    old, new = loaded(path), loaded(folder / "out")
    assert new.get_parameter("lm_head.weight").dtype == torch.bfloat16
    assert torch.equal(logits(new), logits(old))


def test_other_weights_for_the_same_configuration(folder: Path) -> None:
    path = saved(folder, "llama")
    state = {n: t * 1.5 for n, t in build("llama").state_dict().items()}
    torch.save(state, folder / "tuned.pt")
    assert main(["balance", f"hf:{path}", "--checkpoint", "tuned.pt", "--output", "out.pt"]) == 0
    new = torch.load(folder / "out.pt")
    assert new.keys() == state.keys()
    assert not torch.equal(new["model.layers.0.mlp.up_proj.weight"],
                           state["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


def test_analyze_and_smooth_take_it_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(folder, "llama")
    assert main(["analyze", "hf:in", "--frozen", "rescale", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM from hf:in" in out
    assert "mlp.up_proj" in out
    (folder / "data.py").write_text(
        "import torch\nbatches = [{'input_ids': torch.arange(32).reshape(2, 16) + i} "
        "for i in range(3)]"
    )
    assert main(["smooth", "hf:in", "--output", "out", "--batches", "data.py:batches"]) == 0
    assert torch.allclose(
        logits(loaded(folder / "out")), logits(loaded(folder / "in")), rtol=1e-4, atol=1e-5
    )


def test_verify_and_compare_draw_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(folder, "llama")
    assert main(["balance", "hf:in", "--output", "out"]) == 0
    changed = loaded(path)
    with torch.no_grad():
        changed.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
    changed.save_pretrained(folder / "other")  # type: ignore[operator]
    capsys.readouterr()
    for other, same in (("out", True), ("other", False)):
        assert main(["verify", "hf:in", "in", other, "--json"]) == (0 if same else 1)
        found = json.loads(capsys.readouterr().out)
        assert (found["same"], found["rescaling"]) == (same, same)
        assert found["outputs"][0]["shape"] == [2, 16, 64]
        assert (found["outputs"][0]["change_in_float64"] > 1e-4) != same
        assert main(["compare", "hf:in", "in", other, "--json"]) == 0
        assert (json.loads(capsys.readouterr().out)["after"] < 1e-6) == same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_experts_are_run_in_float64(
    folder: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = build("mixtral").to(dtype)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder / "in")
    torch.save(model.state_dict(), folder / "packed.pt")
    argv = ["balance", "hf:in", "--checkpoint", "packed.pt", "--output", "out.pt", "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["verified"]["float64_change"] < 1e-12
    after = torch.load(folder / "out.pt")
    name = "model.layers.1.mlp.experts.down_proj"
    assert not torch.equal(after[name], model.state_dict()[name])
    assert main(["verify", "hf:in", "packed.pt", "out.pt"]) == 0
    after[name] *= 1.5
    torch.save(after, folder / "out.pt")
    assert main(["verify", "hf:in", "packed.pt", "out.pt"]) == 1


def test_experts_that_are_stored_one_by_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(folder, "mixtral")
    capsys.readouterr()
    assert main(["balance", "hf:in", "--output", "out"]) == 2
    err = capsys.readouterr().err
    assert "save the state_dict() of that model, and give this file" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["balance", "hf:none", "--output", "out"], "none cannot be read: No such file"),
        (["balance", "hf:in", "--output", "in"], "the output in is the input"),
        (["balance", "hf:in", "--output", "in/out"], "lies within the input"),
        (["balance", "hf:in", "--output", "out", "--arg", "a=1"], "hf:FOLDER takes none"),
        (["balance", "hf:odd", "--output", "out"], "odd"),
        (["balance", "hf:bare", "--output", "out"], "is a folder without weights"),
        (["analyze", "hf:none"], "hf:none: there is no none/config.json"),
        (["analyze", "hf:bare"], "is a folder without weights"),
        (["balance", "net.py:Net", "--output", "out"], "--checkpoint is needed"),
    ],
)
def test_one_line_exit_2_and_nothing_written(
    folder: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(folder, "llama")
    for name in ("odd", "bare"):
        (folder / name).mkdir()
    (folder / "odd" / "config.json").write_text('{"model_type": "no such model"}')
    (folder / "odd" / "model.safetensors").write_bytes(
        next(path.glob("*.safetensors")).read_bytes()
    )
    (folder / "bare" / "config.json").write_bytes((path / "config.json").read_bytes())
    before = contents(folder)
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("enorm-fx: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert contents(folder) == before
