import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engines.animatediff.checkpoint import load_diffusers_unet, load_schedule, load_text_encoder, load_vae
from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.animatediff.demo_weights import write_demo_weights
from engines.checkpoints.source import Source
from engines.checkpoints.weights import file_patterns, fold_lora, load_strict, locate, read_file, read_lora, read_tensors
from engines.errors import WeightsError

NAME = "diffusion_pytorch_model.safetensors"


def layer() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)})


def test_a_misfit_names_missing_unexpected_and_misshaped_keys_and_loads_nothing():
    module = layer()
    before = module["a"].bias.clone()
    tensors = {"a.weight": torch.zeros(2, 4), "a.bias": torch.zeros(2), "b.weight": torch.zeros(2, 2), "c.weight": torch.zeros(1)}
    with pytest.raises(WeightsError) as error:
        load_strict(module, tensors, "net", torch.float32)
    assert str(error.value) == "net: 1 missing: b.bias; 1 unexpected: c.weight; 1 mis-shaped: a.weight (2, 4) instead of (2, 3)"
    assert torch.equal(module["a"].bias, before)


def test_a_long_list_of_faults_is_cut():
    with pytest.raises(WeightsError, match=r"10 unexpected: .* and 2 more"):
        load_strict(nn.Module(), {f"x{i}": torch.zeros(1) for i in range(10)}, "net", torch.float32)


def test_a_pickle_is_never_opened(tmp_path: Path):
    trap = tmp_path / "diffusion_pytorch_model.bin"
    trap.write_bytes(pickle.dumps(print))
    with pytest.raises(WeightsError, match=r"only \.safetensors"):
        read_file(trap)
    with pytest.raises(WeightsError, match="holds no"):
        read_tensors(tmp_path, "diffusion_pytorch_model")


def test_a_truncated_file_is_refused(tmp_path: Path):
    save_file({"x": torch.zeros(100)}, tmp_path / NAME)
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:-40])
    with pytest.raises(WeightsError, match="cannot be read"):
        read_file(tmp_path / NAME)


def test_shards_and_variants_are_read(tmp_path: Path):
    save_file({"x": torch.zeros(1)}, tmp_path / "m.fp16-00001-of-00002.safetensors")
    save_file({"y": torch.ones(1)}, tmp_path / "m.fp16-00002-of-00002.safetensors")
    index = {"weight_map": {"x": "m.fp16-00001-of-00002.safetensors", "y": "m.fp16-00002-of-00002.safetensors"}}
    (tmp_path / "m.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert read_tensors(tmp_path, "m", "fp16").keys() == {"x", "y"}


def test_a_repo_without_a_revision_is_refused():
    with pytest.raises(WeightsError, match="name a revision"):
        locate(Source(repo="wangfuyun/AnimateLCM"), ["*"])


def test_a_hub_that_does_not_answer_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="wangfuyun/AnimateLCM at 0123abc could not be downloaded"):
        locate(Source(repo="wangfuyun/AnimateLCM", revision="0123abc"), file_patterns("diffusion_pytorch_model", None))


def test_a_repo_in_the_hubs_cache_is_read_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_weights):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--wangfuyun--AnimateLCM" / "snapshots" / commit
    shutil.copytree(demo_weights.motion_adapter.folder, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = locate(Source(repo="wangfuyun/AnimateLCM", revision=commit), file_patterns("diffusion_pytorch_model", None))
    assert read_tensors(found, "diffusion_pytorch_model")


@pytest.fixture
def weights(tmp_path: Path) -> AnimateDiffWeights:
    """A copy of the weights that a test may damage."""
    return write_demo_weights(tmp_path / "demo")


def config(weights: AnimateDiffWeights) -> AnimateDiffConfig:
    return AnimateDiffConfig(weights=weights)


def test_demo_weights_are_the_same_every_time(weights: AnimateDiffWeights, demo_weights: AnimateDiffWeights):
    for a, b in zip(sorted(weights.base.folder.rglob("*")), sorted(demo_weights.base.folder.rglob("*")), strict=True):
        assert a.name == b.name
        assert a.is_dir() or a.read_bytes() == b.read_bytes()


def test_a_unet_with_a_key_too_few_or_too_many_is_refused(weights: AnimateDiffWeights):
    path = weights.motion_adapter.folder / NAME
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(WeightsError, match=f"1 missing: {key}"):
        load_diffusers_unet(config(weights))
    save_file({**tensors, "conv_in.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"stored twice: conv_in\.weight"):
        load_diffusers_unet(config(weights))


def test_position_tables_may_be_left_out(weights: AnimateDiffWeights):
    path = weights.motion_adapter.folder / NAME
    with_tables = load_diffusers_unet(config(weights)).state_dict()
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("pos_embed.pe")}, path)
    without = load_diffusers_unet(config(weights)).state_dict()
    assert all(torch.equal(with_tables[key], without[key]) for key in with_tables)


def test_an_adapter_without_mid_module_is_served(weights: AnimateDiffWeights):
    folder = weights.motion_adapter.folder
    tensors = {k: v for k, v in load_file(folder / NAME).items() if not k.startswith("mid_block")}
    save_file(tensors, folder / NAME)
    adapter = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**adapter, "use_motion_mid_block": False}))
    assert not hasattr(load_diffusers_unet(config(weights)).mid_block, "motion_modules")


def test_a_config_that_the_layers_do_not_compute_is_refused(weights: AnimateDiffWeights):
    path = weights.base.folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "time_cond_proj_dim": 256}))
    with pytest.raises(WeightsError, match="time_cond_proj_dim is 256; only None is served"):
        load_diffusers_unet(config(weights))


def test_betas_are_linear_although_the_base_says_otherwise(weights: AnimateDiffWeights):
    path = weights.base.folder / "scheduler" / "scheduler_config.json"
    stored = json.loads(path.read_text())
    assert stored["beta_schedule"] == "scaled_linear"
    assert load_schedule(weights).alphas_cumprod[999].item() == pytest.approx(0.001579, abs=1e-6)
    assert load_schedule(weights).prediction_type == "v_prediction"
    path.write_text(json.dumps({k: v for k, v in stored.items() if k != "prediction_type"}))
    assert load_schedule(weights).prediction_type == "epsilon"


def test_the_bases_own_vae_with_its_old_key_names_loads(weights: AnimateDiffWeights):
    stored = load_file(weights.base.folder / "vae" / NAME)
    vae = load_vae(replace(weights, vae=None), torch.float32)
    assert torch.equal(vae.decoder.mid_block.attentions[0].to_q.weight, stored["decoder.mid_block.attentions.0.query.weight"])


def test_a_vae_override_replaces_the_bases(weights: AnimateDiffWeights):
    assert not torch.equal(
        load_vae(weights, torch.float32).decoder.conv_in.weight,
        load_vae(replace(weights, vae=None), torch.float32).decoder.conv_in.weight,
    )


def test_the_text_encoder_computes_what_transformers_does(weights: AnimateDiffWeights):
    encoder = load_text_encoder(weights, torch.float32)
    stored = load_file(weights.base.folder / "text_encoder" / "model.safetensors")
    assert torch.equal(encoder.state_dict()["final_layer_norm.weight"], stored["text_model.final_layer_norm.weight"])


PAIR = {"down": torch.full((2, 3), 0.5), "up": torch.ones(4, 2)}
LORA_STYLES = {
    "kohya": ("lora_unet_mid_attn_to_q.lora_down.weight", "lora_unet_mid_attn_to_q.lora_up.weight"),
    "peft": ("unet.mid.attn.to_q.lora_A.weight", "unet.mid.attn.to_q.lora_B.weight"),
    "peft default": (
        "base_model.model.mid.attn.to_q.lora_A.default.weight",
        "base_model.model.mid.attn.to_q.lora_B.default.weight",
    ),
    "diffusers": ("unet.mid.attn.to_q.lora.down.weight", "unet.mid.attn.to_q.lora.up.weight"),
    "diffusers linear layers": (
        "unet.mid.attn.to_q.lora_linear_layer.down.weight",
        "unet.mid.attn.to_q.lora_linear_layer.up.weight",
    ),
    "peft of a part": ("base_model.model.unet.mid.attn.to_q.lora_A.weight", "base_model.model.unet.mid.attn.to_q.lora_B.weight"),
    "diffusers processors": ("mid.attn.processor.to_q_lora.down.weight", "mid.attn.processor.to_q_lora.up.weight"),
}


@pytest.mark.parametrize("style", LORA_STYLES)
def test_every_lora_key_style_folds_alike(style: str):
    down, up = LORA_STYLES[style]
    weights = {"mid.attn.to_q.weight": torch.zeros(4, 3), "mid.attn.to_k.weight": torch.zeros(4, 3)}
    fold_lora(weights, {down: PAIR["down"], up: PAIR["up"]}, 0.8, "lora")
    assert weights["mid.attn.to_q.weight"].tolist() == [[pytest.approx(0.8)] * 3] * 4
    assert not weights["mid.attn.to_k.weight"].any()


def test_the_output_projections_old_name_finds_its_layer():
    weights = {"mid.attn.to_out.0.weight": torch.zeros(4, 3)}
    lora = {"mid.attn.processor.to_out_lora.down.weight": PAIR["down"], "mid.attn.processor.to_out_lora.up.weight": PAIR["up"]}
    fold_lora(weights, lora, 1.0, "lora")
    assert weights["mid.attn.to_out.0.weight"].any()


@pytest.mark.parametrize("prefix", ["lora_unet_", "unet.", "base_model.model.", ""])
@pytest.mark.parametrize("alpha", ["alpha", "lora.alpha"])
def test_alpha_scales_by_the_rank(prefix: str, alpha: str):
    weights = {"a.weight": torch.zeros(4, 3)}
    lora = {f"{prefix}a.lora.down.weight": PAIR["down"], f"{prefix}a.lora.up.weight": PAIR["up"]}
    fold_lora(weights, lora | {f"{prefix}a.{alpha}": torch.tensor(1.0)}, 1.0, "lora", alpha=7)
    assert weights["a.weight"][0, 0].item() == pytest.approx(0.5)


def test_alpha_of_pefts_metadata_scales_layers_without_their_own(tmp_path: Path):
    lora = {"unet.a.lora_A.weight": PAIR["down"], "unet.a.lora_B.weight": PAIR["up"]}
    source = Source(folder=tmp_path, file="lora.safetensors")
    for settings, factor in (({"unet.lora_alpha": 1, "unet.r": 2}, 0.5), ({}, 1.0), ({"unet.lora_alpha": 4}, 2.0)):
        save_file(lora, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
        weights = {"a.weight": torch.zeros(4, 3)}
        tensors, alpha = read_lora(source)
        fold_lora(weights, tensors, 1.0, "lora", alpha)
        assert weights["a.weight"][0, 0].item() == pytest.approx(factor)
    save_file(lora, tmp_path / "lora.safetensors")
    assert read_lora(source)[1] is None


@pytest.mark.parametrize("stated", ['{"unet.use_rslora": true}', '{"unet.alpha_pattern": {"a": 3}}', "[]", "not JSON"])
def test_settings_of_peft_that_are_not_served_are_refused(tmp_path: Path, stated: str):
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors", {"lora_adapter_metadata": stated})
    with pytest.raises(WeightsError, match=r"use_rslora|alpha_pattern|lora_adapter_metadata"):
        read_lora(Source(folder=tmp_path, file="lora.safetensors"))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_te_text_model_x.lora_down.weight": PAIR["down"]}, "1 matching no weight: lora_te_text_model_x"),
        ({"unet.a.dora_scale": PAIR["down"]}, "matching no weight"),
        ({"unet.a.lora_A.weight": PAIR["down"]}, "half a pair for a.weight"),
        ({"unet.a.lora_A.weight": torch.zeros(2, 9), "unet.a.lora_B.weight": PAIR["up"]}, "cannot take"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(lora: dict[str, torch.Tensor], message: str):
    with pytest.raises(WeightsError, match=message):
        fold_lora({"a.weight": torch.zeros(4, 3)}, lora, 1.0, "lora")
