"""Target profiles: every shipped one loads; unknown names and keys are errors."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.quant_types import QuantSpec
from qnpu.compiler.target import DEFAULT_TARGET, TargetProfile, load_target, target_names


def test_names_are_sorted_and_hold_the_default() -> None:
    assert target_names() == sorted(target_names())
    assert DEFAULT_TARGET in target_names()


@pytest.mark.parametrize("name", target_names())
def test_every_profile_loads_and_says_where_it_is_from(name: str) -> None:
    profile = load_target(name)
    assert profile.id == name
    assert profile.source
    for bits in (8, 16):
        assert profile.activation_spec(bits).bits == bits


def test_kinds_of_activations() -> None:
    assert load_target("onnxruntime").activation_spec(16) == QuantSpec(16, False, False)
    assert load_target("mediatek-mdla").activation_spec(16) == QuantSpec(16, True, True)
    assert load_target("qnn-htp-v75").activation_spec(8) == QuantSpec(8, False, False)


def test_the_default_profile_is_the_default_of_the_class() -> None:
    loaded = load_target(DEFAULT_TARGET)
    bare = TargetProfile()
    for bits in (8, 16):
        assert loaded.activation_spec(bits) == bare.activation_spec(bits)


@pytest.mark.parametrize("name", ["", "nokia-3310", "../onnxruntime", "onnxruntime.toml"])
def test_unknown_targets(name: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        load_target(name)
    assert caught.value.codes == ["QN502"]


def test_an_unknown_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "new.toml").write_text('id = "new"\nsigned_activation = true\n')
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(DiagnosticError) as caught:
        load_target("new")
    assert caught.value.codes == ["QN503"]


def test_profiles_ship_with_the_package() -> None:
    folder = resources.files("qnpu.compiler").joinpath("targets")
    assert folder.joinpath(f"{DEFAULT_TARGET}.toml").is_file()
