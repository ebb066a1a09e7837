"""The published road, at its scale: an image model of one step, adapted by low rank.

Encoder and decoder of SD-Turbo around its UNet, both with LoRA (Hu et al. 2021); one step from
t = 999; the target's reference, through a frozen encoder, stands where the words of a prompt would.
Weights come from a folder or a hub in the layout of diffusers (`vae/`, `unet/`, `scheduler/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import HEIGHT, WIDTH
from genforce_train.models.encoder import MarkerEncoder, freeze
from genforce_train.models.m2m import Translator

STEP = 999
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = [*ATTENTION, "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut"]
NEEDED = "backbone=sd_turbo needs diffusers and peft: pip install -r requirements/sd.txt"


class SdTurboTranslator(Translator):
    """Marker image of the source and reference of the target -> marker image of the target.

    The condition is the latent of the target's reference, from the marker `encoder` where one is
    given (as many tokens as cells, projected), else from a frozen copy of the model's own encoder
    (viewed as tokens of the UNet's width). Checkpoints keep what is trained; the rest is read from
    `weights` again.
    """

    frozen_base = ("vae", "unet", "reference_vae")

    def __init__(
        self,
        weights: str,
        side: int = 256,
        vae_rank: int = 4,
        unet_rank: int = 8,
        encoder_width: int = 0,
        encoder: MarkerEncoder | None = None,
    ) -> None:
        """`side`: of the square images it works on. Raises `DataError` without the weights."""
        super().__init__()
        try:
            import diffusers
            from peft import LoraConfig
        except ImportError as error:
            raise ConfigError(f"{NEEDED} ({error})") from None
        self._given = {"weights": weights, "side": side}
        self._given |= {"vae_rank": vae_rank, "unet_rank": unet_rank}
        self.side = side
        self.vae: Any = _read(diffusers.AutoencoderKL, weights, "vae")
        self.unet: Any = _read(diffusers.UNet2DConditionModel, weights, "unet")
        noise = _read(diffusers.DDPMScheduler, weights, "scheduler").alphas_cumprod
        self.signal = float(noise[min(STEP, len(noise) - 1)])
        width = int(self.unet.config.cross_attention_dim)
        self.encoder: MarkerEncoder | None = None
        if encoder is not None or encoder_width:
            self.encoder = encoder or MarkerEncoder(encoder_width)
            self.words: nn.Module = nn.Linear(MarkerEncoder.latent, width)
        else:
            self.reference_vae: Any = freeze(_read(diffusers.AutoencoderKL, weights, "vae"))
            self.width = width
        for net, rank in ((self.vae, vae_rank), (self.unet, unet_rank)):
            net.requires_grad_(False)
            names = [n for n, m in net.named_modules() if n.endswith(tuple(LAYERS))]
            names = [n for n in names if _adaptable(net.get_submodule(n))]
            net.add_adapter(LoraConfig(r=rank, init_lora_weights="gaussian", target_modules=names))
        if self.encoder is not None:
            freeze(self.encoder)

    def forward(self, source: Tensor, target_reference: Tensor) -> Tensor:
        """See `Translator`."""
        return functional.interpolate(
            self._square(source, target_reference), self.size, mode="area"
        )

    def whole(self, source: Tensor, target_reference: Tensor) -> Tensor:
        """See `Translator`."""
        small = functional.adaptive_avg_pool2d(target_reference, self.size)
        image = self._square(source, small)
        return functional.interpolate(image, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)

    def blocks(self) -> list[nn.Module]:
        """What gradient checkpointing computes anew: the UNet's own choice."""
        self.unet.enable_gradient_checkpointing()
        return []

    def shape(self) -> dict[str, Any]:
        """See `Translator`."""
        return self._given | {"encoder_width": self.encoder.width if self.encoder else 0}

    def _square(self, source: Tensor, target_reference: Tensor) -> Tensor:
        """(n, 1, side, side) in 0..1."""
        latent = self.vae.encode(self._photo(source[:, :1])).latent_dist.mode()
        latent = latent * self.vae.config.scaling_factor
        step = torch.full((len(source),), STEP, device=source.device)
        words = self._condition(target_reference)
        noise = self.unet(latent, step, encoder_hidden_states=words).sample
        latent = (latent - (1 - self.signal) ** 0.5 * noise) / self.signal**0.5
        shown = self.vae.decode(latent / self.vae.config.scaling_factor).sample
        return shown.mean(1, keepdim=True) / 2 + 0.5

    def _condition(self, reference: Tensor) -> Tensor:
        """Tokens (n, k, width) of references (n, 1, 120, 160)."""
        if self.encoder is not None:
            with torch.no_grad():
                latent = self.encoder.encode(reference)[0]
            return self.words(latent.flatten(2).transpose(1, 2))
        with torch.no_grad():
            latent = self.reference_vae.encode(self._photo(reference)).latent_dist.mode()
        return latent.flatten(1).unflatten(1, (-1, self.width))

    def _photo(self, image: Tensor) -> Tensor:
        """Marker images (n, 1, h, w) in 0..1 -> (n, 3, side, side) in -1..1."""
        size = (self.side, self.side)
        image = functional.interpolate(image, size, mode="bilinear", align_corners=False)
        return (2 * image - 1).expand(-1, 3, -1, -1)


class ClipDiscriminator(nn.Module):
    """Real or made? Small heads on what a frozen CLIP image tower sees at several depths
    (Kumari et al. 2022). Weights: a folder or hub name in the layout of transformers."""

    frozen_base = ("tower",)

    def __init__(self, weights: str, depths: int = 3) -> None:
        """Raises `DataError` without the weights."""
        super().__init__()
        try:
            from transformers import CLIPVisionModel
        except ImportError as error:
            raise ConfigError(f"{NEEDED} ({error})") from None
        self.tower: Any = freeze(_read(CLIPVisionModel, weights, None))
        config = self.tower.config
        self.side, layers = int(config.image_size), int(config.num_hidden_layers)
        self.depths = sorted({round(i * layers / depths) for i in range(1, depths + 1)})
        width = int(config.hidden_size)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 1))
            for _ in self.depths
        )

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, h, w) in 0..1 -> (n, depths): above 0 is taken for real."""
        size = (self.side, self.side)
        images = functional.interpolate(images, size, mode="bilinear", align_corners=False)
        images = (images.expand(-1, 3, -1, -1) - 0.45) / 0.27
        hidden = self.tower(images, output_hidden_states=True).hidden_states
        answers = [
            head(hidden[depth]).mean((1, 2))
            for head, depth in zip(self.heads, self.depths, strict=True)
        ]
        return torch.stack(answers, 1)


def _read(kind: Any, weights: str, part: str | None) -> Any:
    """One part of pretrained weights, in safetensors only."""
    words: dict[str, Any] = {} if part is None else {"subfolder": part}
    if kind.__name__ != "DDPMScheduler":
        words["use_safetensors"] = True
    try:
        return kind.from_pretrained(weights, **words)
    except (OSError, ValueError) as error:
        where = Path(weights) / (part or "")
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{where}: no weights of a {kind.__name__} there ({reason}); give a folder in the "
            f"layout of diffusers, or its name on the hub"
        ) from error


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)
