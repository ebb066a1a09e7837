from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from genforce_collect.errors import DataError
from genforce_collect.markers.packing import pack_mask
from genforce_infer.bundle import (
    MANIFEST,
    STATISTICS,
    TARGET_REFERENCE,
    Bundle,
    Statistics,
    read_bundle,
    write_bundle,
)
from genforce_infer.preprocess import IMAGE_STATISTICS

MakeBundle = Callable[..., Bundle]


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_a_bundle_reads_back_as_it_was_written(make_bundle: MakeBundle) -> None:
    written = make_bundle(metrics={"r2": {"fz": 0.98}}, provenance={"command": "train force"})
    read = read_bundle(written.folder)
    assert read.manifest == written.manifest
    assert set(read.manifest.files) == {"force.onnx"}


def test_a_changed_byte_in_a_graph_is_refused(make_bundle: MakeBundle) -> None:
    folder = make_bundle().folder
    data = bytearray((folder / "force.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "force.onnx").write_bytes(data)
    with pytest.raises(DataError, match=r"force\.onnx: sha256 differs"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(colour="red"), "colour: unknown key"),
        (lambda m: m.pop("sensor"), "sensor: Field required"),
        (lambda m: m.update(format=2), "format: Input should be 1"),
        (lambda m: m["input"].update(height=90), "the manifest's input says"),
        (lambda m: m["state"][0].update(shape=[1, 4]), "the manifest's state says"),
        (lambda m: m.update(state=[]), "input 'hidden' is neither a state"),
        (
            lambda m: m["state"].append({"name": "cell", "shape": [1]}),
            "state: no graph reads cell",
        ),
        (lambda m: m.update(opset=18), "opset 17, but the manifest says opset: 18"),
        (lambda m: m["normalisation"].update(scale=[1.0]), r"normalisation\.scale has 1 entries"),
        (lambda m: m["normalisation"].update(scale=[1.0, 1.0, float("nan")]), "finite number"),
        (lambda m: m.update(outputs=["fx", "fy", "fz", "tz"]), "entries for 4 outputs"),
        (lambda m: m["files"].update({"../force.onnx": "0"}), "not a plain file name"),
        (lambda m: m["files"].update({"more.onnx": "0"}), r"more\.onnx: missing"),
        (lambda m: m["files"].clear(), r"files: force\.onnx missing"),
        (lambda m: m.update(mode="field"), "mode field has 2 stages, found 1"),
        (lambda m: m["input"].update(height=481), "input: .*larger than a frame .* px_per_mm"),
        (lambda m: m["files"].update({"x" * 300: "0"}), "File name too long"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_by_name(
    make_bundle: MakeBundle, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    folder = make_bundle().folder
    edit_manifest(folder, change)
    with pytest.raises(DataError, match=text) as caught:
        read_bundle(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json there"):
        read_bundle(tmp_path)


def test_something_that_is_not_onnx_is_refused(tmp_path: Path, models: SimpleNamespace) -> None:
    with pytest.raises(DataError, match="not an ONNX model"):
        write_bundle(tmp_path / "bundle", models.manifest(), {"force.onnx": b"not a graph"})


def test_a_bundle_that_does_not_fit_leaves_the_old_one_in_place(
    make_bundle: MakeBundle, models: SimpleNamespace
) -> None:
    old = make_bundle(model_id="old")
    with pytest.raises(DataError):
        write_bundle(old.folder, models.manifest(opset=21), {"force.onnx": models.force()})
    assert read_bundle(old.folder).manifest.model_id == "old"
    make_bundle(model_id="new")
    assert read_bundle(old.folder).manifest.model_id == "new"
    assert [path.name for path in old.folder.parent.iterdir()] == [old.folder.name]


def test_a_folder_that_is_no_bundle_is_never_replaced(
    tmp_path: Path, models: SimpleNamespace
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not a bundle"):
        write_bundle(tmp_path, models.manifest(), {"force.onnx": models.force()})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_translation_needs_the_reference_of_its_source(
    tmp_path: Path, models: SimpleNamespace
) -> None:
    manifest = models.manifest(mode="translate", stages=("translate.onnx", "force.onnx"))
    with pytest.raises(DataError, match=r"target_reference\.npy missing"):
        write_bundle(tmp_path / "bundle", manifest, models.translate())


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, r"files: training_statistics\.npz missing"),
        (b"nothing", r"training_statistics\.npz: not a \.npz"),
        (npz(mean=np.zeros(3, np.float32)), r"not a \.npz of mean and whitening"),
        (npz(mean=np.array([{}]), whitening=np.eye(1)), "allow_pickle=False"),
        (npz(mean=np.zeros(3), whitening=np.eye(3)), r"float64\(3,\).*expected float32"),
        (npz(mean=np.zeros(3, "f"), whitening=np.eye(2, dtype="f")), "expected float32"),
        (
            npz(mean=np.zeros(2, "f"), whitening=np.eye(2, dtype="f")),
            r"'features' has shape \[1, 3\], but .*training_statistics\.npz says \[1, 2\]",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_refused(
    tmp_path: Path, models: SimpleNamespace, content: bytes | None, text: str
) -> None:
    manifest = models.manifest(out_of_distribution={"source": "features", "threshold": 1.0})
    files = {"force.onnx": models.force()} | ({STATISTICS: content} if content else {})
    with pytest.raises(DataError, match=text):
        write_bundle(tmp_path / "bundle", manifest, files)


def test_statistics_of_an_image_are_as_many_as_are_taken_of_one(
    tmp_path: Path, models: SimpleNamespace
) -> None:
    manifest = models.manifest(out_of_distribution={"source": "image", "threshold": 1.0})
    for length, fits in ((IMAGE_STATISTICS, True), (3, False)):
        usual = Statistics(np.zeros(length, np.float32), np.eye(length, dtype=np.float32))
        files = {"force.onnx": models.force(), STATISTICS: usual.to_npz()}
        with nullcontext() if fits else pytest.raises(DataError, match="mean of 3 numbers"):
            write_bundle(tmp_path / "bundle", manifest, files)


def test_a_source_reference_smaller_than_the_input_is_refused(
    tmp_path: Path, models: SimpleNamespace
) -> None:
    folder = write_bundle(
        tmp_path / "bundle",
        models.manifest(
            mode="translate",
            stages=("translate.onnx", "force.onnx"),
            input={"height": models.height, "width": models.width, "px_per_mm": 20.0},
        ),
        models.translate() | {TARGET_REFERENCE: npy(pack_mask(np.zeros((480, 640), np.uint8)))},
    ).folder
    edit_manifest(folder, lambda m: m["input"].update(height=481))
    with pytest.raises(DataError, match=r"input is larger than target_reference\.npy"):
        read_bundle(folder)


def test_a_file_that_may_not_be_read_is_named(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_bundle().folder
    whole = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "force.onnx":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"force\.onnx: Permission denied"):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["image", "force"])
def test_graphs_that_do_not_work_in_float32_are_refused(
    tmp_path: Path, models: SimpleNamespace, name: str
) -> None:
    model = onnx.load_model_from_string(models.force())
    for item in (*model.graph.input, *model.graph.output):
        if item.name == name:
            item.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    files = {"force.onnx": model.SerializeToString()}
    with pytest.raises(DataError, match=rf"force\.onnx: '{name}' is not a tensor of float32"):
        write_bundle(tmp_path / "bundle", models.manifest(), files)


def test_stages_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, models: SimpleNamespace
) -> None:
    manifest = models.manifest(mode="field", stages=("field.onnx", "force.onnx"), state=())
    stages = models.field()
    write_bundle(tmp_path / "right", manifest, stages)
    swapped = {"field.onnx": stages["force.onnx"], "force.onnx": stages["field.onnx"]}
    with pytest.raises(DataError, match=r"field\.onnx: input 'field' is neither a state"):
        write_bundle(tmp_path / "swapped", manifest, swapped)
