from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from genforce_collect.errors import ConfigError, DataError, DeviceError
from genforce_collect.markers.packing import pack_mask
from genforce_infer.bundle import TARGET_REFERENCE, Bundle, write_bundle
from genforce_infer.runtime import Model, Stream, build_engine

MakeBundle = Callable[..., Bundle]


def step(stream: Stream, image: np.ndarray) -> dict[str, np.ndarray]:
    stream.image[:] = image
    return stream.step()


@pytest.fixture
def images(models: SimpleNamespace) -> np.ndarray:
    """(6, 1, 2, H, W): different random images."""
    rng = np.random.default_rng(0)
    return rng.random((6, 1, 2, models.height, models.width)).astype(np.float32)


def test_the_state_is_carried_from_frame_to_frame(
    make_bundle: MakeBundle, images: np.ndarray
) -> None:
    bundle = make_bundle(memory=0.8)
    session = ort.InferenceSession(bundle.path("force.onnx"), providers=["CPUExecutionProvider"])
    stream = Model(bundle).stream()
    hidden = np.zeros((1, 3), np.float32)
    for image in images:
        force, hidden, _ = session.run(
            ["force", "hidden_next", "features"], {"image": image, "hidden": hidden}
        )
        np.testing.assert_allclose(step(stream, image)["force"], force, rtol=1e-6)


def test_reset_forgets_the_past(make_bundle: MakeBundle, images: np.ndarray) -> None:
    stream = Model(make_bundle(memory=0.8)).stream()
    first = step(stream, images[0])["force"]
    assert not np.array_equal(step(stream, images[1])["force"], first)
    stream.reset()
    np.testing.assert_array_equal(step(stream, images[0])["force"], first)


def test_streams_of_one_model_do_not_mix(make_bundle: MakeBundle, images: np.ndarray) -> None:
    model = Model(make_bundle(memory=0.9))
    alone = model.stream()
    expected = [step(alone, image)["force"] for image in images]
    answers: list[list[np.ndarray]] = [[], [], []]

    def work(answer: list[np.ndarray]) -> None:
        stream = model.stream()
        answer.extend(step(stream, image)["force"] for image in images)

    threads = [threading.Thread(target=work, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in answers:
        np.testing.assert_array_equal(answer, expected)


def test_answers_of_earlier_frames_keep_their_values(
    make_bundle: MakeBundle, images: np.ndarray
) -> None:
    stream = Model(make_bundle()).stream()
    first = step(stream, images[0])["force"]
    kept = first.copy()
    step(stream, images[1])
    step(stream, images[2])
    np.testing.assert_array_equal(first, kept)


def test_the_same_image_again_runs_only_what_remembers(
    tmp_path: Path, models: SimpleNamespace, images: np.ndarray
) -> None:
    reference = io.BytesIO()
    np.save(reference, pack_mask(np.zeros((480, 640), np.uint8)))
    bundle = write_bundle(
        tmp_path / "bundle",
        models.manifest(mode="translate", stages=("translate.onnx", "force.onnx")),
        {**models.translate(), TARGET_REFERENCE: reference.getvalue()},
    )
    stream, other = Model(bundle).stream(), Model(bundle).stream()
    first = step(stream, images[0])["force"]
    np.testing.assert_array_equal(step(other, images[0])["force"], first)
    expected = step(stream, images[0])["force"]
    assert not np.array_equal(expected, first)  # it remembers
    other.image[:] = images[1]  # which a translation would see
    np.testing.assert_array_equal(other.step(same_image=True)["force"], expected)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="has a GPU")
def test_the_fallback_to_the_cpu_is_reported(make_bundle: MakeBundle) -> None:
    choice = Model(make_bundle()).choice
    assert choice.provider == "cpu"
    assert [text.split(":")[0] for text in choice.fallbacks] == ["tensorrt", "cuda"]


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="has a GPU")
def test_a_gpu_asked_for_by_name_is_not_silently_replaced(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENFORCE_ENGINE_CACHE", str(tmp_path / "engines"))
    bundle = make_bundle()
    with pytest.raises(DeviceError, match="cuda: not in this onnxruntime"):
        Model(bundle, "cuda")
    with pytest.raises(DeviceError, match="tensorrt: not in this onnxruntime") as caught:
        build_engine(bundle)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("engines/**/*.engine"))


def test_an_unknown_provider_is_refused(make_bundle: MakeBundle) -> None:
    with pytest.raises(ConfigError, match="provider 'quantum'"):
        Model(make_bundle(), "quantum")  # type: ignore[arg-type]


def test_an_opset_newer_than_the_runtime_is_refused(
    tmp_path: Path, models: SimpleNamespace
) -> None:
    newest = onnx.defs.onnx_opset_version()
    model = onnx.load_from_string(models.force())
    model.opset_import[0].version = newest + 30
    bundle = write_bundle(
        tmp_path / "bundle",
        models.manifest(opset=newest + 30),
        {"force.onnx": model.SerializeToString()},
    )
    with pytest.raises(DataError, match=r"force\.onnx: .*[Oo]pset"):
        Model(bundle)
