"""Models of torchvision, timm and diffusers, small, against eager PyTorch: `docs/coverage.md` is what this prints.

    pip install -e ".[models]"
    python -m tests.architectures.libraries [--only REGEX] [--out outcomes.jsonl]

Each is run forward, in evaluation mode, and trained for three steps of AdamW in float32 on a slice of one CPU device;
outputs, losses, parameters and buffers are compared with eager PyTorch's. `--table FILE` writes the table of outcomes.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import torchways as tw
from tests.architectures.sweep import SECONDS, Outcome, outcome_of_model, restart

BATCH, CLASSES = 2, 10


@dataclass(frozen=True)
class Case:
    """A model and what it is called with.

    Attributes:
        library: "torchvision", "timm" or "diffusers".
        name: of the function or class that makes it.
        options: of that.
        inputs: makes the model's arguments with a generator.
    """

    library: str
    name: str
    inputs: Callable[[torch.Generator], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        model = _MAKERS[self.library](self.name, self.options)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for rate in ("drop_prob", "p", "drop_rate"):  # stochastic depth, dropout by attributes
                if type(module).__name__ in ("DropPath", "StochasticDepth") and hasattr(module, rate):
                    setattr(module, rate, 0.0)
        return model


def _from_torchvision(name: str, options: dict[str, Any]) -> torch.nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, **{"num_classes": CLASSES, **options})


def _from_timm(name: str, options: dict[str, Any]) -> torch.nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def _from_diffusers(name: str, options: dict[str, Any]) -> torch.nn.Module:
    import diffusers

    return getattr(diffusers, name)(**options)


_MAKERS = {"torchvision": _from_torchvision, "timm": _from_timm, "diffusers": _from_diffusers}


def _image(size: int, argument: str = "x", channels: int = 3) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {argument: torch.randn(BATCH, channels, size, size, generator=generator)}


def _video(frames: int, size: int) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {"x": torch.randn(BATCH, 3, frames, size, size, generator=generator)}


def _tensors(**shapes: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    """Makes float32 tensors of the shapes, and of a tuple (limit, shape...) that begins with "int" indices."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, shape in shapes.items():
            if shape[0] == "int":
                made[name] = torch.randint(shape[1], shape[2:], generator=generator)
            else:
                made[name] = torch.randn(shape, generator=generator)
        return made

    return make


_VISION = {
    64: (
        "alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 mobilenet_v2 "
        "mobilenet_v3_small efficientnet_b0 efficientnet_v2_s regnet_y_400mf regnet_x_400mf shufflenet_v2_x0_5 "
        "squeezenet1_1 mnasnet0_5 convnext_tiny swin_t swin_v2_t"
    ),
    96: "inception_v3 googlenet",
}
_SEGMENTATION = {"fcn_resnet50": "x", "deeplabv3_mobilenet_v3_large": "x", "lraspp_mobilenet_v3_large": "input"}
_TIMM = (
    "resnet10t resnet26d seresnet18 ecaresnet26t resnest14d res2net50_26w_4s dla34 hrnet_w18_small darknet53 "
    "cspresnet50 repvgg_a0 ghostnet_100 tinynet_e rexnet_100 regnetz_b16 nf_resnet26 hardcorenas_a fbnetc_100 "
    "mobilenetv4_conv_small convnextv2_atto poolformer_s12 convmixer_768_32 hgnetv2_b0 starnet_s1 mambaout_femto "
    "fastvit_t8 efficientvit_b0 edgenext_xx_small repghostnet_050 inception_next_atto"
)
_TIMM_OF_SIZE = (
    "vit_tiny_patch16_224 deit_tiny_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 mixer_s16_224 "
    "gmlp_ti16_224 resmlp_12_224 xcit_nano_12_p16_224 cait_xxs24_224 convit_tiny swin_tiny_patch4_window7_224"
)
_SMALL_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_TEXT_UNET = {
    **_SMALL_UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
_TEXT_INPUTS = {"sample": (BATCH, 4, 16, 16), "timestep": ("int", 100, BATCH), "encoder_hidden_states": (BATCH, 5, 16)}


def _diffusers() -> list[Case]:
    auto = {"block_out_channels": (16,), "norm_num_groups": 8, "latent_channels": 4}
    sd3 = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8}
    cases = [
        Case(
            "diffusers",
            "UNet2DModel",
            _tensors(sample=(BATCH, 3, 16, 16), timestep=("int", 100, BATCH)),
            {
                **_SMALL_UNET,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": 4,
            },
        ),
        Case("diffusers", "UNet2DConditionModel", _tensors(**_TEXT_INPUTS), _TEXT_UNET),
        Case("diffusers", "AutoencoderKL", _tensors(sample=(BATCH, 3, 16, 16)), auto),
        Case("diffusers", "VQModel", _tensors(sample=(BATCH, 3, 16, 16)), {**auto, "num_vq_embeddings": 16}),
        Case(
            "diffusers",
            "AutoencoderTiny",
            _tensors(sample=(BATCH, 3, 16, 16)),
            {
                "encoder_block_out_channels": (16, 16),
                "decoder_block_out_channels": (16, 16),
                "num_encoder_blocks": (1, 1),
                "num_decoder_blocks": (1, 1),
            },
        ),
        Case(
            "diffusers",
            "DiTTransformer2DModel",
            _tensors(hidden_states=(BATCH, 4, 16, 16), timestep=("int", 100, BATCH), class_labels=("int", 10, BATCH)),
            {
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "in_channels": 4,
                "num_layers": 2,
                "sample_size": 16,
                "norm_num_groups": 8,
                "num_embeds_ada_norm": 10,
            },
        ),
        Case(
            "diffusers",
            "SD3Transformer2DModel",
            _tensors(
                hidden_states=(BATCH, 4, 16, 16),
                encoder_hidden_states=(BATCH, 5, 16),
                pooled_projections=(BATCH, 16),
                timestep=("int", 100, BATCH),
            ),
            {
                **sd3,
                "num_attention_heads": 2,
                "joint_attention_dim": 16,
                "caption_projection_dim": 16,
                "pooled_projection_dim": 16,
                "out_channels": 4,
            },
        ),
        Case(
            "diffusers",
            "PixArtTransformer2DModel",
            lambda generator: {
                **_tensors(
                    hidden_states=(BATCH, 4, 16, 16),
                    encoder_hidden_states=(BATCH, 5, 16),
                    timestep=("int", 100, BATCH),
                )(generator),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
            {
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 2,
                "cross_attention_dim": 16,
                "caption_channels": 16,
                "sample_size": 16,
            },
        ),
        Case(
            "diffusers",
            "UNet1DModel",
            _tensors(sample=(BATCH, 14, 32), timestep=("int", 100, BATCH)),
            {
                "block_out_channels": (16, 32),
                "in_channels": 14,
                "out_channels": 14,
                "extra_in_channels": 0,
                "time_embedding_type": "positional",
                "use_timestep_embedding": True,
                "out_block_type": "OutConv1DBlock",
                "flip_sin_to_cos": False,
                "freq_shift": 1.0,
                "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
                "up_block_types": ("UpResnetBlock1D",),
                "mid_block_type": "MidResTemporalBlock1D",
                "act_fn": "swish",
            },
        ),
        Case(
            "diffusers",
            "ControlNetModel",
            _tensors(**_TEXT_INPUTS, controlnet_cond=(BATCH, 3, 32, 32)),
            {
                "block_out_channels": (16, 32),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "cross_attention_dim": 16,
                "attention_head_dim": 4,
                "conditioning_embedding_out_channels": (16, 32),
            },
        ),
    ]
    return cases


def cases() -> list[Case]:
    """Returns all that the table has."""
    found = [Case("torchvision", name, _image(size)) for size, names in _VISION.items() for name in names.split()]
    for name, argument in _SEGMENTATION.items():
        found.append(Case("torchvision", name, _image(64, argument), {"weights_backbone": None}))
    found += [
        Case("torchvision", "vit_b_16", _image(64), {"image_size": 64}),
        Case("torchvision", "r3d_18", _video(4, 32)),
        Case("torchvision", "mc3_18", _video(4, 32)),
        Case("torchvision", "r2plus1d_18", _video(4, 32)),
        Case("torchvision", "swin3d_t", _video(4, 32)),
    ]
    found += [Case("timm", name, _image(64)) for name in _TIMM.split()]
    found += [Case("timm", name, _image(64), {"img_size": 64}) for name in _TIMM_OF_SIZE.split()]
    return found + _diffusers()


def outcome_of(case: Case, mesh: tw.VirtualSlice, seconds: int = SECONDS) -> Outcome:
    """Runs a model and returns how that went."""

    def build() -> Any:
        return case.build(), lambda seed: case.inputs(torch.Generator().manual_seed(seed))

    return outcome_of_model(f"{case.library} {case.name}", build, mesh, seconds)


def table(outcomes: list[Outcome]) -> str:
    """Returns the table of outcomes, in Markdown."""
    lines = [f"{dict(Counter(item.kind for item in outcomes))}", "", "| model | | s to the first loss | s in all | |"]
    lines += ["|---|---|---|---|---|"]
    for item in outcomes:
        detail = "" if item.kind == "agree" else " ".join(item.detail.split())[:160].replace("|", "/")
        lines.append(f"| {item.name} | {item.kind} | {item.first_seconds} | {item.seconds} | {detail} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default="outcomes.jsonl")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of each")
    parser.add_argument("--part", default="0/1", help="i/n: every nth, from the ith on")
    parser.add_argument("--table", help="write the table of the outcomes in --out there, and run nothing")
    options = parser.parse_args()
    if options.table:
        lines = Path(options.out).read_text().splitlines()
        Path(options.table).write_text(table([Outcome(**json.loads(line)) for line in lines]))
        return
    part, parts = map(int, options.part.split("/"))
    mesh = None
    for number, case in enumerate([case for case in cases() if re.search(options.only, case.name)][part::parts]):
        if mesh is None or number % 20 == 0:
            mesh = restart(1)
        outcome = outcome_of(case, mesh, options.seconds)
        if outcome.kind in ("crash", "slow"):
            mesh = None
        with open(options.out, "a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(f"{outcome.kind:10} {outcome.seconds:6.1f} {outcome.name} {outcome.detail[:300]!r}", flush=True)
    tw.shutdown()


if __name__ == "__main__":
    main()
