"""diffusers' LoRA methods on a pipeline of tiny models."""

from __future__ import annotations

import json

import models
import pytest
import torch
from peft.utils import get_peft_model_state_dict

import peft
from peft import LoraConfig

diffusers = pytest.importorskip("diffusers")

PROMPT = "a b"


def clip_tokenizer(folder):
    """A CLIP tokenizer that knows single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def pipeline(folder):
    """Stable Diffusion of width 8."""
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=54,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            projection_dim=8,
            bos_token_id=52,
            eos_token_id=53,
        )
    )
    pipe = diffusers.StableDiffusionPipeline(
        unet=models.fill(unet),
        vae=models.fill(vae),
        text_encoder=models.fill(text_encoder),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe, **options):
    """Latents after two steps."""
    start = models.noise((1, 4, 8, 8), 3)
    return pipe(PROMPT, num_inference_steps=2, latents=start, output_type="latent", **options).images


def differ(a, b):
    return (a - b).abs().max().item() > 1e-3


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


TARGETS = {"unet": ["to_q", "to_v", "to_out.0", "conv1"], "text_encoder": ["q_proj", "v_proj"]}


def make_lora(folder, name, seed, parts=("unet", "text_encoder"), **options):
    """A LoRA file for UNet and text encoder, written by the pipeline's own save method."""
    pipe = pipeline(folder)
    loras = {}
    for part in parts:
        module = getattr(pipe, part)
        module.add_adapter(
            LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS[part], init_lora_weights=False, **options)
        )
        with torch.no_grad():
            for i, (key, param) in enumerate(module.named_parameters()):
                if "lora_" in key:
                    param.copy_(models.noise(param.shape, seed + i) * 0.3)
        state = diffusers.utils.convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        loras[f"{part}_lora_layers"] = state
    pipe.save_lora_weights(str(folder / name), **loras)
    return folder / name, draw(pipe)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two LoRA files and the image each one gives."""
    folder = tmp_path_factory.mktemp("diffusers")
    return folder, make_lora(folder, "one", 100), make_lora(folder, "two", 900)


def test_loading_switching_and_deleting(files):
    folder, (one, one_image), (two, two_image) = files
    pipe = pipeline(folder)
    base = draw(pipe)
    assert differ(base, one_image)
    assert differ(one_image, two_image)
    pipe.load_lora_weights(str(one), adapter_name="one")
    same(draw(pipe), one_image)
    pipe.load_lora_weights(str(two), adapter_name="two")
    pipe.set_adapters("two")
    same(draw(pipe), two_image)
    assert pipe.get_active_adapters() == ["two"]
    assert {name for names in pipe.get_list_adapters().values() for name in names} == {"one", "two"}
    pipe.set_adapters("one")
    same(draw(pipe), one_image)
    pipe.set_adapters(["one", "two"])
    both = draw(pipe)
    assert differ(both, one_image)
    assert differ(both, two_image)
    pipe.disable_lora()
    same(draw(pipe), base)
    pipe.enable_lora()
    same(draw(pipe), both)
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    same(draw(pipe), one_image)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base)
    assert not any("lora" in name for name, _ in pipe.unet.named_modules())
    assert not any("lora" in name for name, _ in pipe.text_encoder.named_modules())


def test_weights_of_adapters(files):
    folder, (one, one_image), (two, _) = files
    pipe = pipeline(folder)
    base = draw(pipe)
    pipe.load_lora_weights(str(one), adapter_name="one")
    pipe.load_lora_weights(str(two), adapter_name="two")
    pipe.set_adapters(["one", "two"], adapter_weights=[1.0, 0.0])
    same(draw(pipe), one_image)
    pipe.set_adapters(["one", "two"], adapter_weights=[0.0, 0.0])
    same(draw(pipe), base)
    pipe.set_adapters("one", adapter_weights=0.5)
    half = draw(pipe)
    assert differ(half, base)
    assert differ(half, one_image)
    pipe.set_adapters("one")
    same(draw(pipe), one_image)
    same(draw(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    same(draw(pipe), one_image)


def test_fusing_and_unfusing(files):
    folder, (one, one_image), (two, two_image) = files
    pipe = pipeline(folder)
    base = draw(pipe)
    pipe.load_lora_weights(str(one), adapter_name="one")
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    same(draw(pipe), one_image)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    same(draw(pipe), one_image)
    pipe.load_lora_weights(str(two), adapter_name="two")
    pipe.fuse_lora(adapter_names=["two"])
    pipe.unload_lora_weights()
    same(draw(pipe), two_image)
    assert differ(draw(pipe), base)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_dora_file(tmp_path, part):
    if part == "text_encoder" and peft.__version__ == "0.21.2":
        pytest.xfail("upstream does not rename lora_magnitude_vector for transformers' loader")
    path, image = make_lora(tmp_path, "dora", 300, parts=[part], use_dora=True)
    assert differ(draw(pipeline(tmp_path)), image)
    pipe = pipeline(tmp_path)
    pipe.load_lora_weights(str(path), adapter_name="dora")
    same(draw(pipe), image)
    pipe.fuse_lora()
    same(draw(pipe), image)


def test_hotswap(files):
    folder, (one, _), (two, _) = files
    unet_only = draw_unet(folder, two)
    pipe = pipeline(folder)
    pipe.load_lora_into_unet(*unet_state(pipe, one), unet=pipe.unet, adapter_name="slot")
    assert differ(draw(pipe), unet_only)
    pipe.load_lora_into_unet(*unet_state(pipe, two), unet=pipe.unet, adapter_name="slot", hotswap=True)
    same(draw(pipe), unet_only)


def unet_state(pipe, path):
    """The UNet part of a LoRA file."""
    state, alphas = pipe.lora_state_dict(str(path))
    return {k: v for k, v in state.items() if k.startswith("unet.")}, alphas


def draw_unet(folder, path):
    """The image with only the UNet part of a file."""
    pipe = pipeline(folder)
    pipe.load_lora_into_unet(*unet_state(pipe, path), unet=pipe.unet, adapter_name="slot")
    return draw(pipe)
