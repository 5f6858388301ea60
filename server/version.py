"""The version, as pyproject.toml has it; importing it costs nothing."""

VERSION = "0.1.0"
