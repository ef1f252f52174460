"""The configuration: stored, read back, refused when it is wrong."""

import dataclasses
import json

import pytest

from meidnet_core.config import IMPROVED, PAPER, PRESETS, Config, renamed
from meidnet_core.flow import FlowConfig


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    cfg = PRESETS[name]
    assert name in (cfg.name, cfg.dataset.replace("_", "-"))
    assert Config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_the_paper_preset_states_what_the_text_states():
    stated = {"blocks": 3, "latent": 128, "optimizer": "adam", "lr": 1e-3, "batch": 16}
    stated |= {"epochs": 2000, "fusion": "early", "curriculum": "exp", "normalize": False}
    assert {k: getattr(PAPER, k) for k in stated} == stated
    assert PAPER.labels == ("dir_gap", "heat_all")


def test_with_changes_a_copy_only():
    changed = IMPROVED.with_(seed=7, labels=["heat_all"])
    assert (changed.seed, changed.labels) == (7, ("heat_all",))
    assert IMPROVED.seed == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        IMPROVED.seed = 1


def test_unknown_keys_are_refused_by_name():
    values = PAPER.to_dict() | {"widht": 64, "learning_rate": 1.0}
    with pytest.raises(ValueError, match="unknown configuration keys: learning_rate, widht"):
        Config.from_dict(values)
    with pytest.raises(TypeError, match="widht"):
        PAPER.with_(widht=64)


@pytest.mark.parametrize(
    "key, value",
    [
        ("fusion", "middle"),
        ("curriculum", "cosine"),
        ("optimizer", "sgd"),
        ("schedule", "step"),
        ("split_scheme", "random"),
    ],
)
def test_a_bad_value_is_refused_with_the_choices(key, value):
    with pytest.raises(ValueError, match=f"Config.{key} = '{value}': expected one of \\w+"):
        Config(**{key: value})
    with pytest.raises(ValueError, match=f"Config.{key}"):
        Config.from_dict(PAPER.to_dict() | {key: value})


def test_every_field_has_a_default_and_is_stored():
    assert set(Config().to_dict()) == {f.name for f in dataclasses.fields(Config)}


@pytest.mark.parametrize("cfg", [IMPROVED, FlowConfig()])
def test_another_number_of_epochs_has_a_name_of_its_own(cfg):
    assert renamed(cfg, cfg.epochs) is cfg
    other = renamed(cfg, 5)
    assert other.epochs == 5 and other.name == f"{cfg.name}5" and other.seed == cfg.seed
