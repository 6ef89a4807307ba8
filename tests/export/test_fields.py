"""Settings of the model in exports: every field is exported, changes no function, or is refused by name."""

import dataclasses

import exports
import pytest

from lowrank_jax.config import ModelConfig, UsageError
from lowrank_jax.export import gguf, hf, import_weights, onnx, torch, weights

Later = dataclasses.make_dataclass("Later", [("gate", bool, False)], bases=(ModelConfig,), frozen=True)


@pytest.fixture
def later(make, tok):
    """Return a model whose config has a field that no export knows."""
    model = exports.trained(make, tok, latent_norm=False)
    c = Later(**vars(model.config.model), gate=True)
    return model._replace(config=dataclasses.replace(model.config, model=c))


def test_every_field_is_declared():
    assert {
        field.name for field in dataclasses.fields(ModelConfig)
    } == weights.EXPORTED | weights.FREE | weights.NOWHERE
    assert not weights.EXPORTED & weights.FREE and not weights.NOWHERE & (weights.EXPORTED | weights.FREE)


@pytest.mark.parametrize("format", [hf, torch, onnx, gguf])
def test_an_unknown_setting_is_refused_by_name(format, later, tmp_path):
    with pytest.raises(UsageError, match=r"config\.model\.gate=True"):
        format.write(later, str(tmp_path / "out"))


def test_an_unknown_setting_that_changes_nothing_is_exported(later, tmp_path, monkeypatch):
    monkeypatch.setitem(weights.LATER, "gate", False)
    c = dataclasses.replace(later.config.model, gate=False)
    torch.write(later._replace(config=dataclasses.replace(later.config, model=c)), str(tmp_path / "out"))


def test_an_unknown_setting_is_not_imported(make, tok, tmp_path, monkeypatch):
    model = exports.trained(make, tok)
    torch.write(model, str(tmp_path / "out"))
    monkeypatch.setattr(weights, "EXPORTED", weights.EXPORTED - {"tied"})
    monkeypatch.delitem(weights.LATER, "tied")
    with pytest.raises(UsageError, match=r"config\.model\.tied=True"):
        import_weights.open_export(str(tmp_path / "out"))
