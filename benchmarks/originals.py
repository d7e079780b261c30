"""A pipeline's weights as one file, under the names that the original checkpoints have.

The reverse of what diffusers reads: names of CompVis and Stability (U-Net, VAE), of OpenCLIP, and
of Stable Diffusion 3's MM-DiT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

UNET = {
    r"time_embedding\.linear_1": "time_embed.0",
    r"time_embedding\.linear_2": "time_embed.2",
    r"add_embedding\.linear_1": "label_emb.0.0",
    r"add_embedding\.linear_2": "label_emb.0.2",
    r"conv_in\.": "input_blocks.0.0.",
    r"conv_norm_out\.": "out.0.",
    r"conv_out\.": "out.2.",
    r"mid_block\.resnets\.0": "middle_block.0",
    r"mid_block\.attentions\.0": "middle_block.1",
    r"mid_block\.resnets\.1": "middle_block.2",
}
RESNET = {
    r"\.norm1": ".in_layers.0",
    r"\.conv1": ".in_layers.2",
    r"\.norm2": ".out_layers.0",
    r"\.conv2": ".out_layers.3",
    r"\.time_emb_proj": ".emb_layers.1",
    r"\.conv_shortcut": ".skip_connection",
}
VAE = {
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"mid_block\.attentions\.0\.to_": "mid.attn_1.",
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
}
OPEN_CLIP = {
    r"embeddings\.token_embedding": "token_embedding",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"final_layer_norm": "ln_final",
    r"encoder\.layers": "transformer.resblocks",
    r"layer_norm(\d)": r"ln_\1",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"self_attn\.out_proj": "attn.out_proj",
    r"self_attn\.qkv\.": "attn.in_proj_",
}
MM_DIT = {
    r"pos_embed\.pos_embed": "pos_embed",
    r"pos_embed\.proj": "x_embedder.proj",
    r"time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
    r"time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
    r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"proj_out": "final_layer.linear",
    r"transformer_blocks": "joint_blocks",
    r"norm1_context\.linear": "context_block.adaLN_modulation.1",
    r"norm1\.linear": "x_block.adaLN_modulation.1",
    r"ff_context\.net\.0\.proj": "context_block.mlp.fc1",
    r"ff_context\.net\.2": "context_block.mlp.fc2",
    r"ff\.net\.0\.proj": "x_block.mlp.fc1",
    r"ff\.net\.2": "x_block.mlp.fc2",
    r"attn\.add_qkv_proj": "context_block.attn.qkv",
    r"attn\.norm_added_(\w)": r"context_block.attn.ln_\1",
    r"attn\.to_add_out": "context_block.attn.proj",
    r"(attn2?)\.to_qkv": r"x_block.\1.qkv",
    r"(attn2?)\.norm_(\w)\.": r"x_block.\1.ln_\2.",
    r"(attn2?)\.to_out\.0": r"x_block.\1.proj",
}


def single_file(pipe: Any, *, text_encoders: bool = True) -> State:
    """All weights of a pipeline of any family; of Stable Diffusion 3 also without text encoders."""
    vae = {f"first_stage_model.{name}": value for name, value in _vae(pipe.vae).items()}
    if hasattr(pipe, "transformer"):
        texts = _texts_of_3(pipe) if text_encoders else {}
        return contiguous({**vae, **_mm_dit(pipe.transformer), **texts})
    if hasattr(pipe, "text_encoder_2"):
        texts = {
            **_clip(pipe.text_encoder, "conditioner.embedders.0.transformer."),
            **_open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model."),
        }
    elif pipe.text_encoder.config.hidden_act == "gelu":
        texts = _open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        texts = _clip(pipe.text_encoder, "cond_stage_model.transformer.")
    return contiguous({**vae, **_unet(pipe.unet), **texts})


def contiguous(state: Mapping[str, Tensor]) -> State:
    """Tensors that share no memory, as safetensors wants them."""
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _unet(unet: Any) -> State:
    layers = unet.config.layers_per_block
    state = unet.state_dict()
    return {
        f"model.diffusion_model.{_unet_name(name, layers, state)}": value
        for name, value in state.items()
    }


def _unet_name(name: str, layers: int, state: Mapping[str, Tensor]) -> str:
    if block := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.?(.*)", name):
        side, number, kind, layer, rest = block.groups()
        down = side == "down"
        index = int(number) * (layers + 1) + int(layer) + int(down)
        if kind.endswith("samplers"):
            index += layers
        start = f"{'input' if down else 'output'}_blocks.{index}"
        if kind == "downsamplers":
            return rest.replace("conv", f"{start}.0.op")
        if kind == "upsamplers":
            above = f"up_blocks.{number}.attentions.0.norm.weight"
            return f"{start}.{2 if above in state else 1}.{rest}"
        name = f"{start}.{0 if kind == 'resnets' else 1}.{rest}"
        return renamed(name, RESNET) if kind == "resnets" else name
    name = renamed(name, {f"^{old}": new for old, new in UNET.items()})
    return renamed(name, RESNET) if re.match(r"middle_block\.[02]", name) else name


def _vae(vae: Any) -> State:
    last = len(vae.config.up_block_types) - 1

    def original(name: str) -> str:
        if block := re.match(r"decoder\.up_blocks\.(\d)\.(.*)", name):
            rest = renamed(block[2], {r"resnets": "block", r"upsamplers\.0": "upsample"})
            name = f"decoder.up.{last - int(block[1])}.{rest}"
        return renamed(name, VAE)

    return {original(name): value for name, value in vae.state_dict().items()}


def _clip(text_encoder: Any, prefix: str) -> State:
    """As transformers has it, which some of its versions leave `text_model` out of."""
    return {
        prefix + (name if name.startswith("text_") else f"text_model.{name}"): value
        for name, value in text_encoder.state_dict().items()
    }


def _open_clip(text_encoder: Any, prefix: str) -> State:
    """Queries, keys and values in one; the projection the other way round."""
    state = fused(text_encoder.state_dict(), r"self_attn\.{}_proj\.", "self_attn.qkv.")
    found = {}
    for name, value in state.items():
        if name == "text_projection.weight":
            found[f"{prefix}text_projection"] = value.T
        else:
            found[prefix + renamed(name.removeprefix("text_model."), OPEN_CLIP)] = value
    return found


def _mm_dit(transformer: Any) -> State:
    state = fused(transformer.state_dict(), r"\.to_{}\.", ".to_qkv.")
    state = fused(state, r"\.add_{}_proj\.", ".add_qkv_proj.")
    last = f"transformer_blocks.{transformer.config.num_layers - 1}.norm1_context.linear"
    swapped = [name for name in state if name.startswith((last, "norm_out.linear"))]
    state |= {name: torch.cat(state[name].chunk(2)[::-1]) for name in swapped}
    return {
        f"model.diffusion_model.{renamed(name, MM_DIT)}": value for name, value in state.items()
    }


def _texts_of_3(pipe: Any) -> State:
    names = {"clip_l": pipe.text_encoder, "clip_g": pipe.text_encoder_2}
    found = {
        f"text_encoders.{short}.transformer.{name}": value
        for short, clip in names.items()
        for name, value in clip.state_dict().items()
        if (short, name) != ("clip_l", "text_projection.weight")  # taken for the identity
    }
    t5 = pipe.text_encoder_3.state_dict() if pipe.text_encoder_3 else {}
    own = {name: value for name, value in t5.items() if name != "encoder.embed_tokens.weight"}
    return found | {f"text_encoders.t5xxl.transformer.{name}": value for name, value in own.items()}


def fused(state: Mapping[str, Tensor], each: str, all_three: str) -> State:
    """Queries, keys and values, whose names match `each` of q, k and v, in one tensor."""
    found = {}
    for name, value in state.items():
        if re.search(each.format("q"), name):
            plain = each.replace("\\", "")
            three = [re.sub(each.format("q"), plain.format(letter), name) for letter in "qkv"]
            whole = re.sub(each.format("q"), all_three, name)
            found[whole] = torch.cat([state[part] for part in three])
        elif not re.search(each.format("[kv]"), name):
            found[name] = value
    return found


def renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = re.sub(old, new, name)
    return name
