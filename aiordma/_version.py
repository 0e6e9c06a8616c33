"""The version, in one place that costs nothing to import; pyproject.toml and meson.build repeat it."""

__version__ = "0.1.0"
