"""The marker encoder, and the generators that see references through it."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import unpack
from genforce_train.cache import open_layout
from genforce_train.checkpoint import load_checkpoint, save_checkpoint
from genforce_train.losses import hinge, kl_divergence, perceptual_loss
from genforce_train.models.encoder import MarkerEncoder
from genforce_train.models.m2m import CompactTranslator
from genforce_train.pairs import read_pairs
from genforce_train.train_encoder import EncoderSettings, load_encoder
from genforce_train.train_encoder import train as train_encoder
from genforce_train.train_m2m import M2mSettings, train
from genforce_train.training import Run
from genforce_train.translate import load_m2m, translate


@pytest.fixture(scope="module")
def encoder(paired_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoder")
    settings = EncoderSettings(
        data=str(paired_data),
        out=str(out),
        unseen=("cone",),
        steps=60,
        batch=8,
        width=8,
        evaluate_every=30,
        learning_rate=1e-2,
        curves="none",
    )
    return out / "best.safetensors", train_encoder(settings, quiet=True)


def m2m_settings(data, out, **changes) -> M2mSettings:
    few = {"steps": 4, "batch": 2, "width": 8, "evaluate_every": 2, "curves": "none"}
    return M2mSettings(data=str(data), out=str(out), **(few | changes))


def test_encoder_shows_images_it_has_not_seen(encoder):
    path, metrics = encoder
    assert metrics["images"] == 2 * 4 * 12
    assert metrics["validation"]["iou"] > 0.6
    latent, _ = load_encoder(path).encode(torch.zeros(2, 1, 120, 160))
    assert latent.shape == (2, 8, 15, 20)


def test_compact_generator_begins_as_the_reference_and_learns_from_pairs(
    paired_data, encoder, tmp_path
):
    net = CompactTranslator(8)
    reference = torch.rand(1, 1, 120, 160).round()
    with torch.no_grad():
        assert torch.equal(net(torch.rand(1, 2, 120, 160), reference).round(), reference)
    changes = {
        "backbone": "compact",
        "encoder": str(encoder[0]),
        "perceptual": 0.1,
        "steps": 60,
        "batch": 8,
        "evaluate_every": 30,
        "learning_rate": 5e-3,
        "unseen": ("cone",),
    }
    metrics = train(m2m_settings(paired_data, tmp_path, **changes), quiet=True)
    pair = metrics["validation"]["left-right"]
    assert pair["rms_px"] < pair["moved_px"]
    net, meta = load_m2m(tmp_path / "best.safetensors")
    assert meta["shape"] == {"width": 8, "encoder_width": 8}
    # The encoder is frozen: what stands in the checkpoint is what it was.
    for name, value in load_encoder(encoder[0]).state_dict().items():
        assert torch.equal(net.encoder.state_dict()[name], value)
    cache = open_layout(paired_data)
    left, right = (cache.reference(name) for name in ("left", "right"))
    assert unpack(translate(net, cache.bits[:3], left, right)).shape == (3, 480, 640)


def test_the_simulated_grid_pairs_patterns_by_name(tmp_path):
    rng = np.random.default_rng(0)
    for pattern in ("Array1", "Circle1"):
        images = [f"{indenter}/{pattern}/0_0_{z}" for indenter in "ab" for z in (0.3, 0.6)]
        for name in (f"{pattern}_ref", *images):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            mask = cv2.resize(rng.integers(0, 2, (12, 16), np.uint8), (640, 480), interpolation=0)
            cv2.imwrite(f"{tmp_path / name}.jpg", mask * 255)
    pairs = read_pairs(tmp_path, unseen=("b",), validation=0)
    assert pairs.sensors == ("Array1", "Circle1")
    assert {use: len(moments) for use, moments in pairs.uses.items()} == {
        "train": 2,
        "validation": 0,
        "test": 2,
    }
    left, right = (pairs.images(np.full(1, s), pairs.uses["train"][:1]) for s in (0, 1))
    assert not np.array_equal(left, right)


# --- losses -------------------------------------------------------------------------------------


def test_losses_are_zero_where_nothing_is_wrong():
    image = torch.rand(2, 1, 120, 160)
    features = MarkerEncoder(8).eval().features
    assert float(perceptual_loss(features, image, image)) == 0
    assert float(perceptual_loss(features, image, image.flip(-1))) > 0
    assert float(kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3))) == 0
    assert float(hinge(torch.full((2,), 2.0), torch.full((2,), -2.0))) == 0
    assert float(hinge(torch.zeros(2), torch.zeros(2))) == 2


# --- bad input ----------------------------------------------------------------------------------


def test_what_generators_lack_is_said_before_training(paired_data, encoder, tmp_path):
    with pytest.raises(ConfigError, match="perceptual needs encoder"):
        train(m2m_settings(paired_data, tmp_path, backbone="compact", perceptual=1.0), quiet=True)
    save_checkpoint(tmp_path / "x.safetensors", torch.nn.Linear(1, 1), {"kind": "force"})
    with pytest.raises(DataError, match="expected an encoder"):
        load_encoder(tmp_path / "x.safetensors")
    settings = EncoderSettings(
        data=str(paired_data), out=str(tmp_path / "o"), unseen=("cone", "sphere")
    )
    with pytest.raises(DataError, match="no image left"):
        train_encoder(settings, quiet=True)
    assert not (tmp_path / "o").exists()


# --- SD-Turbo, in miniature ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """Folders of random weights of SD-Turbo's and CLIP's architectures, as small as they get."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    ).save_pretrained(root / "sd/vae")
    diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=4,
        sample_size=32,
    ).save_pretrained(root / "sd/unet")
    diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(root / "sd/scheduler")
    transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(root / "clip")
    return root


class Killed(Exception):
    """In place of a signal."""


def first_steps(count: int):
    """`Run.steps` that is killed after so many."""
    whole = Run.steps

    def steps(run):
        for number, step in enumerate(whole(run)):
            if number == count:
                raise Killed
            yield step

    return steps


@pytest.mark.parametrize("with_encoder", [False, True])
def test_sd_turbo_trains_checkpoints_resumes_and_translates(
    with_encoder, paired_data, encoder, miniature, tmp_path
):
    def settings(name, **changes):
        given = {
            "backbone": "sd_turbo",
            "weights": str(miniature / "sd"),
            "side": 64,
            "discriminator": str(miniature / "clip"),
            "gradient_checkpointing": with_encoder,
        }
        if with_encoder:
            given |= {"encoder": str(encoder[0]), "perceptual": 1.0}
        return m2m_settings(paired_data, tmp_path / name, **(given | changes))

    stopped = settings("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "steps", first_steps(2))
        with pytest.raises(Killed):
            train(stopped, quiet=True)
    resumed = train(stopped.model_copy(update={"resume": True}), quiet=True)
    whole = train(settings("whole"), quiet=True)
    assert resumed["validation"] == whole["validation"]
    states = [load_checkpoint(tmp_path / n / "last.safetensors").parts for n in ("whole", "killed")]
    assert states[0].keys() == {"model", "optimiser", "rival", "rival_optimiser"}
    for part, tensors in states[0].items():
        for name, value in tensors.items():
            assert torch.equal(states[1][part][name], value), f"{part}.{name}"
    net, meta = load_m2m(tmp_path / "whole/best.safetensors")
    assert meta["model"] == "sd_turbo"
    assert json.dumps(meta["shape"])
    # Only what was trained is kept; the weights of the base stay where they are.
    size = sum(path.stat().st_size for path in (miniature / "sd").rglob("*.safetensors"))
    assert (tmp_path / "whole/best.safetensors").stat().st_size < size
    cache = open_layout(paired_data)
    left, right = (cache.reference(name) for name in ("left", "right"))
    first = translate(net, cache.bits[:2], left, right)
    again = translate(load_m2m(tmp_path / "whole/best.safetensors")[0], cache.bits[:2], left, right)
    assert np.array_equal(first, again)


def test_a_missing_weights_folder_is_named_before_training(paired_data, miniature, tmp_path):
    changes = {"backbone": "sd_turbo", "weights": str(tmp_path / "nowhere")}
    with pytest.raises(DataError, match="nowhere/vae: no weights"):
        train(m2m_settings(paired_data, tmp_path / "out", **changes), quiet=True)
    changes = {"backbone": "field", "discriminator": str(tmp_path / "nowhere")}
    with pytest.raises(DataError, match="no weights of a CLIPVisionModel"):
        train(m2m_settings(paired_data, tmp_path / "out", **changes), quiet=True)
    assert not (tmp_path / "out").exists()
