"""LoRA: what trains is A and B, what is saved is W + B A, and rollouts use both."""

import json
import shutil
import sys

import peft
import pytest
import torch
import transformers
from conftest import qwen3_asr_folder, tiny_model
from runs import BOTH, argv_of, lines_of, run_on_cpu, write_stage
from safetensors.torch import load_file

import model as m
import opd
from data import InputError, collate

on_cpu = pytest.fixture(autouse=True, scope="module")(run_on_cpu)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("stage"))


def train(script, stage, out, *more):
    script.main(script.parse_args(argv_of(script, stage, out, "--lora-rank", 4, *more)))
    return out


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def lora_model(seed=0, **sizes):
    """A tiny model whose LoRA is not zero."""
    model = tiny_model(seed, **sizes)
    m.add_lora(model, 3, 6.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def batch_of(model):
    waveforms = [torch.sin(torch.arange(n) / 7) for n in (9_000, 16_000, 5_000)]
    return collate(waveforms, model.front_end, ["en"] * 3)


@BOTH
def test_only_lora_encoder_and_adapter_train(stage, tmp_path, script):
    """The LM's own weights stay bit for bit; the merged projections, the encoder and the adapter move."""
    out = train(script, stage, tmp_path / "run", "--steps", 3)
    before = weights_of(stage / "student")
    after = weights_of(out / "model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        is_frozen = name.startswith(("model.language_model.", "lm_head.")) and not name.endswith(
            tuple(f"{projection}.weight" for projection in m.PROJECTIONS)
        )
        assert torch.equal(tensor, after[name]) == is_frozen, name
    # And with the other parts left out, lora/ is the whole change.
    out = train(script, stage, tmp_path / "lm", "--steps", 2, "--train-parts", "lm")
    after = weights_of(out / "model")
    for name, tensor in before.items():
        if not name.startswith("model.language_model."):
            assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_and_steps_are_those_of_w_plus_ba_written_out(tied):
    """Three updates of a LoRA model, and of the plain one whose weights are W + (alpha / rank) B A."""
    lora = lora_model(tied=tied).double()
    plain = tiny_model(0, tied=tied).double()
    trained = m.trained_parameters(lora)
    batch = batch_of(lora)
    rollout = lora.front_end.transcripts(["one", "twenty", ""])
    tokens = rollout.ids[rollout.row_mask()]

    # The plain model's leaves: A and B of each projection, and what trains beside LoRA.
    own = dict(plain.named_parameters())
    pairs = {}  # stock name of a projection → [A, B]
    beside = {}
    for name, parameter in trained.items():
        if ".lora_" in name:
            stock = name.split(".lora_")[0] + ".weight"
            pairs.setdefault(stock, []).append(parameter.detach().clone().requires_grad_())
        else:
            beside[name] = own[name]
    leaves = [*beside.values()]
    for pair in pairs.values():
        leaves += pair
    assert len(leaves) == len(trained) and len(pairs) == 7 * len(lora.lm.layers)
    frozen = {name: tensor.detach() for name, tensor in own.items() if name not in beside}

    def written_out():
        merged = {name: frozen[name] + 2.0 * up @ down for name, (down, up) in pairs.items()}
        return {**frozen, **beside, **merged}

    def loss_of(hidden):
        return torch.nn.functional.cross_entropy(hidden @ lora.head.weight.detach().T, tokens)

    ours = torch.optim.AdamW(trained.values(), lr=1e-2)
    theirs = torch.optim.AdamW(leaves, lr=1e-2)
    for _ in range(3):
        loss = loss_of(lora(batch, rollout))
        plain_loss = loss_of(torch.func.functional_call(plain, written_out(), (batch, rollout)))
        assert plain_loss.item() == pytest.approx(loss.item(), rel=1e-9)
        for optimizer, value in ((ours, loss), (theirs, plain_loss)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    merged = m.merged_weights(lora)
    for name, tensor in written_out().items():
        assert torch.allclose(merged[name], tensor, atol=1e-7), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.no_grad()
def test_merged_folder_equals_unmerged_logits_and_peft_reads_its_own(tmp_path, family):
    """Stock transformers on the merged folder, and with lora/ on the base, agree with ours."""
    base = tiny_model(0, model_type=family, spread=0.1)
    base.save_pretrained(tmp_path / "base")
    model = lora_model(0, model_type=family, spread=0.1)
    model.save_pretrained(tmp_path / "merged")
    m.save_lora(model, tmp_path / "lora")
    batch = batch_of(model)
    rollout = model.sample(batch, 12, k=4)
    logits = model.head(model(batch, rollout))
    merged = m.SpeechLM.from_pretrained(tmp_path / "merged").eval()
    assert (merged.head(merged(batch, rollout)) - logits).abs().max() < 1e-5
    assert (base.head(base(batch, rollout)) - logits).abs().max() > 1e-2

    stock_class = transformers.GlmAsrForConditionalGeneration
    stock = stock_class.from_pretrained(tmp_path / "merged")
    with_lora = peft.PeftModel.from_pretrained(
        stock_class.from_pretrained(tmp_path / "base"), tmp_path / "lora"
    )
    n_lora = sum(".lora_A." in name for name, _ in with_lora.named_parameters())
    assert n_lora == 7 * len(model.lm.layers)  # none beside the encoder's projections
    ids = batch.prompt_ids[:1]
    ids = torch.where(ids == model.front_end.audio_id, model.front_end.stop_id, ids)
    assert (stock(input_ids=ids).logits - with_lora(input_ids=ids).logits).abs().max() < 1e-5


@torch.no_grad()
def test_a_rollout_is_that_of_a_loop_through_pefts_modules(monkeypatch):
    """The fast decoder is used, and writes what the plain loop writes; the bare LM writes something else."""
    model = lora_model(3, model_type="qwen3", spread=0.1)
    batch = batch_of(model)
    assert m.may_copy_weights(model)
    fast = model.sample(batch, 20, k=6)
    monkeypatch.setattr(m, "may_copy_weights", lambda model: False)
    loop = model.sample(batch, 20, k=6)
    assert torch.equal(fast.ids, loop.ids) and torch.equal(fast.topk_ids, loop.topk_ids)
    bare = tiny_model(3, model_type="qwen3", spread=0.1).sample(batch, 20, k=6)
    assert bare.ids.tolist() != fast.ids.tolist()


@torch.no_grad()
def test_qwen3_asr_with_lora(tmp_path):
    """The same of Qwen3-ASR, the student that vLLM serves: merged folder, lora/ on the base, rollouts."""
    folder = qwen3_asr_folder(tmp_path / "base")
    model = m.SpeechLM.from_pretrained(folder).eval()
    m.add_lora(model, 3, 6.0, seed=1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2)
    assert all(".lora_" in name for name in m.trained_parameters(model, ["lm"]))
    model.save_pretrained(tmp_path / "merged")
    m.save_lora(model, tmp_path / "lora")
    stock_class = transformers.Qwen3ASRForConditionalGeneration
    merged = stock_class.from_pretrained(tmp_path / "merged")
    with_lora = peft.PeftModel.from_pretrained(stock_class.from_pretrained(folder), tmp_path / "lora")
    ids = torch.arange(20)[None]
    assert (merged(input_ids=ids).logits - with_lora(input_ids=ids).logits).abs().max() < 1e-5
    base = stock_class.from_pretrained(folder)
    assert (merged(input_ids=ids).logits - base(input_ids=ids).logits).abs().max() > 1e-2
    batch = batch_of(model)
    ours = m.SpeechLM.from_pretrained(tmp_path / "merged").eval()
    assert m.may_copy_weights(model)
    assert torch.equal(model.sample(batch, 8).ids, ours.sample(batch, 8).ids)


@pytest.mark.parametrize("config", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_another_lora_is_not_copied(config):
    """The fast decoder and the merged folder know plain LoRA only."""
    model = tiny_model(0)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], **config), model.lm)
    assert not m.may_copy_weights(model)
    with pytest.raises(AssertionError, match="plain LoRA only"):
        m.merged_weights(model)


@pytest.mark.slow
@BOTH
def test_resume_is_the_straight_run(stage, tmp_path, script):
    flags = ["--steps", 4, "--save-every", 2, "--keep", 9]
    straight = train(script, stage, tmp_path / "straight", *flags)
    resumed = train(script, stage, tmp_path / "resumed", *flags)
    for name in ("step-4", "model", "lora"):
        (resumed / name).rename(tmp_path / f"{script.__name__}-{name}")
    (resumed / "summary.json").unlink()
    train(script, stage, resumed, *flags, "--resume")
    ours, theirs = ([line["loss"] for line in lines_of(out / "metrics.jsonl")] for out in (straight, resumed))
    assert ours == theirs
    for file in ("model/model.safetensors", "lora/adapter_model.safetensors", "step-4/state.safetensors"):
        assert (straight / file).read_bytes() == (resumed / file).read_bytes(), file


@pytest.mark.slow
def test_resume_with_another_base_is_refused(stage, tmp_path):
    """A and B belong to the weights that they were learned on."""
    shutil.copytree(stage / "student", tmp_path / "student")
    flags = ["--steps", 4, "--save-every", 2, "--keep", 9, "--student", tmp_path / "student"]
    out = train(opd, stage, tmp_path / "run", *flags)
    shutil.rmtree(out / "step-4")
    (out / "summary.json").unlink()
    tiny_model(5, spread=0.1).save_pretrained(tmp_path / "student")
    with pytest.raises(InputError, match="--student .*: the run began with other content"):
        train(opd, stage, out, *flags, "--resume")


@pytest.mark.slow
def test_folders_of_a_run(stage, tmp_path):
    """lora/ beside every model; a run without LoRA has none, and rank 0 is the run without the flag."""
    out = train(opd, stage, tmp_path / "run", "--lora-alpha", 8)
    config = json.loads((out / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert (out / "step-1" / "lora" / "adapter_model.safetensors").exists()
    weights = load_file(out / "lora" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in weights)
    without = train(opd, stage, tmp_path / "without", "--lora-rank", 0)
    assert not (without / "lora").exists()


def test_lora_without_the_lm_or_without_peft_is_refused(stage, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train(opd, stage, tmp_path / "run", "--train-parts", "encoder")
    assert "--lora-rank trains the LM" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        train(opd, stage, tmp_path / "run")
