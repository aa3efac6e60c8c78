"""The version, on its own so that every room can name it and the build can read it."""

__version__ = "0.1.0"
