"""The version, for those who may not import the package that they say it of."""

__version__ = "0.1.0"
