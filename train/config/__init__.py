"""A run's config: one YAML file, read strictly, overridden by flags, stored with everything that it makes."""

from train.config.describe import Field, difference, fields, to_data
from train.config.load import dump, load, parse, parse_stored
from train.config.moved import MOVED
from train.config.run import RunConfig

__all__ = ["MOVED", "Field", "RunConfig", "difference", "dump", "fields", "load", "parse", "parse_stored", "to_data"]
