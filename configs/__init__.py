"""Typed settings of one experiment, one YAML file each; see `configs.schema`."""
