"""Target profiles: every shipped one loads; unknown names and keys are errors."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from pydantic import ValidationError

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.pipeline import canonical_passes
from qnpu.compiler.quant_types import QuantSpec
from qnpu.compiler.target import (
    DEFAULT_TARGET,
    TargetProfile,
    Verdict,
    load_target,
    target_names,
)
from qnpu.passes.canonicalize_mask import CanonicalizeMask


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Profiles are read once; a test that ships others must not leave them behind."""
    yield
    load_target.cache_clear()


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


@pytest.mark.parametrize("name", target_names())
def test_only_onnx_runtime_has_four_bit_activations(name: str) -> None:
    assert load_target(name).activation_bits_min == (4 if name == DEFAULT_TARGET else 8)


def test_the_default_profile_is_the_default_of_the_class() -> None:
    loaded = load_target(DEFAULT_TARGET)
    bare = TargetProfile()
    for bits in (8, 16):
        assert loaded.activation_spec(bits) == bare.activation_spec(bits)


@pytest.mark.parametrize("name", ["", "nokia-3310", "../onnxruntime", "o.toml", "_qnn-htp"])
def test_unknown_targets(name: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        load_target(name)
    assert caught.value.codes == ["QN502"]


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, **profiles: str) -> None:
    """Ships these profiles instead."""
    (folder / "targets").mkdir()
    for name, text in profiles.items():
        (folder / "targets" / f"{name}.toml").write_text(text)
    monkeypatch.setattr(resources, "files", lambda package: folder)
    load_target.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        'id = "new"\nsigned_activation = true',
        'id = "new"\nsigned_activations = "perhaps"',
        'id = "new"\n[graph]\nrank = 4',
        'id = "new"\n[[rules]]\nverdict = "int"',
        'id = "new"\n[[rules]]\nops = ["Relu"]\nverdict = "good"',
        'id = "new"\n[[rules]]\nops = ["Relu"]\nverdict = "int"\ninputs = [["u8 wide"]]',
        'id = "new"\ninherits = "nothing"',
        'id = "new"\ninherits = "new"',
        'id = "new"\ninherits = ["new"]',
        'id = "new"\nrules = 3',
        "id = " + "[" * 50_000,
        "id = " + "9" * 5000,
        'id = ""',
        "id = new",
    ],
)
def test_faults_of_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    write(tmp_path, monkeypatch, new=text)
    with pytest.raises(DiagnosticError) as caught:
        load_target("new")
    assert caught.value.codes == ["QN503"]


def test_profiles_that_inherit_from_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, monkeypatch, a='id = "a"\ninherits = "b"', b='id = "b"\ninherits = "a"')
    with pytest.raises(DiagnosticError) as caught:
        load_target("a")
    assert caught.value.codes == ["QN503"]


def test_a_profile_inherits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables key by key, rules before those of the parent; a parent is not a target itself."""
    base = """
        id = "_base"
        summary = "base"
        [vendor]
        name = "V"
        arch = 1
        [[rules]]
        ops = ["Relu"]
        verdict = "int"
    """
    child = """
        id = "new"
        inherits = "_base"
        [vendor]
        arch = 2
        [[rules]]
        ops = ["Tanh"]
        verdict = "float"
    """
    write(tmp_path, monkeypatch, _base=base, new=child)
    profile = load_target("new")
    assert (profile.id, profile.summary) == ("new", "base")
    assert (profile.vendor.name, profile.vendor.arch) == ("V", 2)
    assert [rule.ops for rule in profile.rules] == [("Tanh",), ("Relu",)]
    assert target_names() == ["new"]


def test_the_mask_constant_is_the_targets_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        monkeypatch,
        new='id = "new"\nmask_value = -30.0',
        plain='id = "plain"',
        bad='id = "bad"\nmask_value = 3.0',
    )
    assert CompileConfig(target="new").mask_constant == -30
    assert CompileConfig(target="new", mask_value=-40.0).mask_constant == -40
    assert CompileConfig(target="plain").mask_constant == -50
    config = CompileConfig(target="new")
    (mask,) = (p for p in canonical_passes(config) if isinstance(p, CanonicalizeMask))
    assert mask.mask_value == -30
    with pytest.raises(DiagnosticError) as caught:
        CompileConfig(target="bad")
    assert caught.value.codes == ["QN503"]


@pytest.mark.parametrize("name", target_names())
def test_every_row_says_where_it_is_from_and_what_is_wrong(name: str) -> None:
    for rule in load_target(name).rules:
        assert rule.source
        assert rule.verdict is Verdict.INT or rule.does


def test_profiles_ship_with_the_package() -> None:
    folder = resources.files("qnpu.compiler").joinpath("targets")
    assert folder.joinpath(f"{DEFAULT_TARGET}.toml").is_file()


@pytest.mark.parametrize(
    "more",
    [
        {"legalize": "lpbq"},
        {"legalize": "second-operand"},
        {"legalize": "one-type", "to": "u8"},
        {"to": "u8"},
        {"legalize": "lpbq", "to": "u5"},
        {"legalize": "forced-encoding"},
        {"legalize": "reduce-rank"},
        {"legalize": "nonsense"},
    ],
)
def test_rewrites_that_a_row_cannot_name(more: dict[str, str]) -> None:
    row = {"ops": ["MatMul"], "verdict": "float"}
    assert TargetProfile.model_validate({"rules": [row]}).rules
    with pytest.raises(ValidationError):
        TargetProfile.model_validate({"rules": [row | more]})


def test_rows_that_are_taken_name_no_rewrite() -> None:
    for name in target_names():
        rules = load_target(name).rules
        assert not [r for r in rules if r.legalize is not None and r.verdict is Verdict.INT]
