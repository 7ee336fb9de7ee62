"""The settings of a fit are the same thing from a configuration and from Python arguments."""

import pytest

from ekfac_dist.config import DataConfig, EstimateConfig, FactorsConfig, ModelConfig
from ekfac_dist.errors import ConfigError
from ekfac_dist.fit.settings import FitSettings

MODEL = ModelConfig(name="m", modules=["*.up_proj"])
DATA = DataConfig(source="d.jsonl", max_tokens=128)
FACTORS = FactorsConfig(labels="data", partitions=3)


def settings_of(**changes: object) -> FitSettings:
    arguments = {"batch_tokens": 64, "save_minutes": 5, "output": "store", **changes}
    return FitSettings.of_arguments(MODEL, DATA, FACTORS, **arguments)


def test_arguments_and_a_configuration_give_the_same_settings():
    config = EstimateConfig(
        model=MODEL, data=DATA, factors=FACTORS, batch_tokens=64, save_minutes=5, output="store"
    )
    assert settings_of() == FitSettings.of_config(config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"save_minutes": -1}, "save_minutes is -1"),
        ({"output": ""}, "output is not given"),
    ],
)
def test_arguments_are_refused_as_fields_are(changes: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        settings_of(**changes)
